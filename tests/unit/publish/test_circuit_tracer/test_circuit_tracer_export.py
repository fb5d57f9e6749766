"""A suite's transcoders written for circuit-tracer: the set, the feature files as its viewer reads them, labels on its graphs."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from invented_coders import D_SAE, TRANSCODER, assert_equal_coders, assert_same_function, coder
from invented_suite import DEAD, WORDS, Shape, SuiteShape, write_suite

from everyscope.base.errors import ConfigError, DamagedData, DataError
from everyscope.base.files import read_json, read_sealed, sha256, write_json, write_sealed
from everyscope.cli.main import dispatch
from everyscope.publish.circuit_tracer import run as export
from everyscope.publish.circuit_tracer.config import CircuitTracerConfig
from everyscope.publish.circuit_tracer.features import GROUPS, percentiles, read_feature
from everyscope.publish.circuit_tracer.run import label_graph
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sites import norms
from everyscope.sites.names import Site
from everyscope.suite.formats.circuit_tracer import layer_files, read_config
from everyscope.suite.reader import load_sae

LAYERS = 3  # of the invented suite's model


def transcoder(layer: int, seed: int) -> Sae:
    return coder(skip=True, seed=seed, metadata=replace(TRANSCODER, site=Site("mlp_in", layer), target=Site("mlp_out", layer)))


def suite_of(root: Path, *shapes: Shape, **fields: Any) -> Path:
    """An invented suite with weights: the transcoder of each record, of its layer and its place in the suite."""
    saes = shapes or tuple(Shape(Site("transcoder", layer), D_SAE, 9.0) for layer in range(LAYERS))
    folder = write_suite(root, SuiteShape(saes, **fields))
    index = read_sealed(folder / "suite.json")
    for number, record in enumerate(index["saes"]):
        home = folder / record["folder"]
        transcoder(record["layer"], number).save(home)
        record["files"] |= {name: sha256(home / name) for name in ("cfg.json", "sae_weights.safetensors")}
    write_sealed(folder / "suite.json", index)
    return folder


def exported(suite: Path, out: Path, **fields: Any) -> export.CircuitTracerResult:
    return export.run(CircuitTracerConfig(suite=suite, out=out, **fields))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite and its export. Read them, never write to them."""
    root = tmp_path_factory.mktemp("tracer")
    suite = suite_of(root / "suite")
    result = exported(suite, root / "out")
    assert (result.num_layers, result.num_latents) == (LAYERS, LAYERS * D_SAE)
    return suite, root / "out"


def test_the_set_is_the_suites_transcoders(both: tuple[Path, Path]):
    _, out = both
    for layer, path in enumerate(layer_files(out)):
        assert_equal_coders(load_sae(path), transcoder(layer, layer))
    assert read_config(out / "config.yaml") == {
        "model_name": "org/Some-Model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": str(out.resolve()),
    }


def test_every_offset_decompresses_to_the_json_of_its_latent(both: tuple[Path, Path]):
    suite, out = both
    index = json.loads(gzip.decompress((out / "features/index.json.gz").read_bytes()))
    vocabulary = pyarrow.parquet.read_table(suite / "text/vocabulary.parquet")["text"].to_pylist()
    assert list(index) == ["0", "1", "2"]
    for layer, entry in index.items():
        data = (out / "features" / entry["filename"]).read_bytes()
        assert len(entry["offsets"]) == D_SAE + 1
        assert entry["offsets"][-1] == len(data)
        home = suite / f"transcoder/layer_{layer}/width_{D_SAE}/average_l0_9"
        rows = pyarrow.parquet.read_table(home / "latents.parquet").to_pylist()
        for latent, (begin, end) in enumerate(zip(entry["offsets"], entry["offsets"][1:], strict=False)):
            length = int.from_bytes(data[begin : begin + 4], "little")
            assert length == end - begin - 4
            feature = json.loads(gzip.decompress(data[begin + 4 : begin + 4 + length]))
            assert feature == read_feature(out / "features", int(layer), latent)
            assert_is_row(feature, rows[latent], vocabulary)
            assert feature["transcoder_id"] == f"{out.resolve()}/layer_{layer}"


def assert_is_row(feature: dict[str, Any], row: dict[str, Any], vocabulary: list[str]) -> None:
    assert feature["index"] == row["latent"]
    assert feature["act_max"] == pytest.approx(row["max_activation"] or 0, rel=1e-5)
    assert feature["activation_frequency"] == pytest.approx(row["frequency"], rel=1e-5)
    assert feature["histogram"] == (row["histogram"] or [])
    is_plain = {token for token, text in enumerate(vocabulary) if text in WORDS}
    for side in ("top_logits", "bottom_logits"):
        wanted = [entry["token"] for entry in row[side] or []]
        assert len(feature[side]) == len(wanted)
        assert all(got == vocabulary[token] for got, token in zip(feature[side], wanted, strict=True) if token in is_plain)
    quantiles, examples = feature["examples_quantiles"], row["examples"] or []
    assert [quantile["quantile_name"] for quantile in quantiles] == [
        GROUPS[group] for group in sorted({e["group"] for e in examples})
    ]
    given = [example for quantile in quantiles for example in quantile["examples"]]
    assert len(given) == len(examples)
    for got, wanted in zip(given, sorted(examples, key=lambda example: example["group"]), strict=True):
        assert got["tokens_acts_list"] == pytest.approx(wanted["activations"], rel=1e-3)
        assert got["train_token_ind"] == wanted["position"] - wanted["start"]
        assert len(got["tokens"]) == len(wanted["activations"])
        assert isinstance(got["is_repeated_datapoint"], bool)
    places = [(e["sequence"], e["position"]) for e in sorted(examples, key=lambda example: example["group"])]
    assert len(places) - len(set(places)) == sum(one["is_repeated_datapoint"] for one in given)


def test_a_dead_latent_has_a_page_too(both: tuple[Path, Path]):
    feature = read_feature(both[1] / "features", 1, DEAD - 1)
    assert (feature["act_max"], feature["examples_quantiles"], feature["histogram"], feature["quantile_values"]) == (
        0,
        [],
        [],
        [],
    )
    assert feature["label"] is None


def test_labels_are_in_the_features_and_on_graphs(both: tuple[Path, Path], tmp_path: Path):
    labels = read_json(both[1] / "features/labels.json")
    assert labels["2"]["0"] == read_feature(both[1] / "features", 2, 0)["label"]
    assert labels["2"]["0"].startswith("label 0 of")
    assert str(DEAD - 1) not in labels["0"]
    nodes = [
        {"node_id": "2_0_4", "feature_type": "cross layer transcoder", "clerp": ""},
        {"node_id": "2_1_4", "feature_type": "cross layer transcoder", "clerp": "mine"},
        {"node_id": f"2_{DEAD - 1}_4", "feature_type": "cross layer transcoder", "clerp": ""},
        {"node_id": "0_2_4", "feature_type": "mlp reconstruction error", "clerp": ""},
        {"node_id": "E_3_0", "feature_type": "embedding", "clerp": ""},
    ]
    write_json(tmp_path / "graph.json", {"metadata": {"slug": "a"}, "nodes": nodes, "links": []})
    assert label_graph(tmp_path / "graph.json", labels) == (1, 3)
    found = read_json(tmp_path / "graph.json")
    assert [node["clerp"] for node in found["nodes"]] == [labels["2"]["0"], "mine", "", "", ""]
    assert found["metadata"] == {"slug": "a"}
    write_json(tmp_path / "graph.json", {"nodes": 3})
    with pytest.raises(DataError, match="has no list of nodes"):
        label_graph(tmp_path / "graph.json", labels)


def test_equal_suites_give_equal_bytes(both: tuple[Path, Path], tmp_path: Path):
    exported(both[0], tmp_path / "out", scan=str(both[1].resolve()))
    names = sorted(path.relative_to(both[1]) for path in both[1].rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert all((tmp_path / "out" / name).read_bytes() == (both[1] / name).read_bytes() for name in names)


def test_percentiles_are_read_off_the_histogram():
    """Of 3 firings in the second of four bins and 1 in the last, up to 8."""
    found = percentiles([0, 3, 0, 1], 8.0)
    assert found[24] == pytest.approx(2 + 2 / 3)  # the first of four firings
    assert found[74] == pytest.approx(4)
    assert found[75] == pytest.approx(6 + 2 * 0.04)
    assert found[99] == pytest.approx(8)
    assert percentiles([0, 0, 0, 0], 0.0) == percentiles([], 0.0) == []
    values = np.random.default_rng(0).exponential(size=20_000)
    counts, edges = np.histogram(values, 30, (0, values.max()))
    many = percentiles(counts.tolist(), values.max())
    np.testing.assert_allclose(many, np.percentile(values, range(1, 101)), atol=edges[1])


def test_the_input_is_converted_by_the_models_gain(both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gain = torch.linspace(0.5, 2, 6)
    monkeypatch.setattr(export, "load_language_model", lambda _: type("Model", (), {"adapter": None}))
    monkeypatch.setattr(export, "mlp_norm_of", lambda _, layer: norms.Affine(gain + layer, torch.zeros(6)))
    exported(both[0], tmp_path, input="normalised", features=False)
    assert read_config(tmp_path / "config.yaml")["feature_input_hook"] == "ln2.hook_normalized"
    for layer, path in enumerate(layer_files(tmp_path)):
        assert_same_function(load_sae(path), to_convention(transcoder(layer, layer), "normalised", gain + layer))
    assert not (tmp_path / "features").exists()


def test_one_transcoder_of_each_layer_is_chosen(tmp_path: Path):
    shapes = [Shape(Site("transcoder", layer), D_SAE, l0, is_canonical=l0 == 9.0) for layer in range(LAYERS) for l0 in (5.0, 9.0)]
    suite = suite_of(tmp_path / "suite", *shapes)
    exported(suite, tmp_path / "a", features=False)
    exported(suite, tmp_path / "b", features=False, l0=6.0)
    for layer in range(LAYERS):
        assert_equal_coders(load_sae(tmp_path / f"a/layer_{layer}.safetensors"), transcoder(layer, 2 * layer + 1))
        assert_equal_coders(load_sae(tmp_path / f"b/layer_{layer}.safetensors"), transcoder(layer, 2 * layer))
    with pytest.raises(ConfigError, match=r"no transcoder with a name like \*_skip"):
        exported(suite, tmp_path / "c", saes="*_skip")
    with pytest.raises(ConfigError, match="have widths 40; choose one with --width"):
        exported(suite, tmp_path / "c", width=41)


def test_what_circuit_tracer_could_not_load_is_refused(tmp_path: Path):
    suite = suite_of(tmp_path / "a", Shape(Site("transcoder", 1), D_SAE, 9.0))
    with pytest.raises(ConfigError, match="none of width 40 for layers 0, 2: train those too"):
        exported(suite, tmp_path / "out")
    suite = write_suite(tmp_path / "b", SuiteShape((Shape(Site("resid_post", 1), 6, 2.0),)))
    with pytest.raises(ConfigError, match="has no transcoder, only SAEs of resid_post"):
        exported(suite, tmp_path / "out")
    with pytest.raises(DataError, match="run `everyscope describe`"):
        exported(suite_of(tmp_path / "c", is_described=False), tmp_path / "out")
    suite = suite_of(tmp_path / "d")
    path = suite / f"transcoder/layer_1/width_{D_SAE}/average_l0_9/latents.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(DamagedData, match=r"latents\.parquet"):
        exported(suite, tmp_path / "out")
    assert not (tmp_path / "out/features/index.json.gz").exists()


def test_the_command_writes_a_set(both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    dispatch(
        ["export", str(both[0]), "--format", "circuit-tracer", "--out", str(tmp_path / "out"), "--output-hook", "mlp.hook_out"]
    )
    assert read_config(tmp_path / "out/config.yaml")["feature_output_hook"] == "mlp.hook_out"
    printed = capsys.readouterr().out
    assert "transcoders of 3 layers" in printed
    assert "120 latents" in printed
