"""A suite written for Neuronpedia: the exact files, and what holds for any suite."""

import gzip
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from everyscope.base.errors import ConfigError, DamagedData, DataError
from everyscope.base.files import read_json, read_sealed, sha256, write_sealed
from everyscope.base.tables import write_table
from everyscope.publish.neuronpedia import run as export
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.files import MAX_FILES, Batches, latents_per_file
from everyscope.sites.names import Site

GOLDEN = Path(__file__).parent / "golden"
MANY = int(os.environ.get("EVERYSCOPE_NEURONPEDIA_LATENTS", "70000"))
COLUMNS = {
    "features": {
        "modelId": str,
        "layer": str,
        "index": str,
        "sourceSetName": str,
        "creatorId": str,
        "maxActApprox": float,
        "hasVector": bool,
        "vector": [float],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": float,
        "hookName": str,
        "topkCosSimIndices": [int],
        "topkCosSimValues": [float],
        "neuron_alignment_indices": [int],
        "neuron_alignment_values": [float],
        "neuron_alignment_l1": [float],
        "correlated_neurons_indices": [int],
        "correlated_neurons_pearson": [float],
        "correlated_neurons_l1": [float],
        "correlated_features_indices": [int],
        "correlated_features_pearson": [float],
        "correlated_features_l1": [float],
        "neg_str": [str],
        "neg_values": [float],
        "pos_str": [str],
        "pos_values": [float],
        "frac_nonzero": float,
        "freq_hist_data_bar_heights": [float],
        "freq_hist_data_bar_values": [float],
        "logits_hist_data_bar_heights": [float],
        "logits_hist_data_bar_values": [float],
        "decoder_weights_dist": [float],
    },
    "activations": {
        "id": str,
        "tokens": [str],
        "dataIndex": str,
        "index": str,
        "layer": str,
        "modelId": str,
        "dataSource": str,
        "maxValue": float,
        "maxValueTokenIndex": int,
        "minValue": float,
        "values": [float],
        "dfaValues": [float],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "creatorId": str,
        "lossValues": [float],
        "logitContributions": None,
        "binMin": float,
        "binMax": float,
        "binContains": float,
        "qualifyingTokenIndex": int,
    },
    "explanations": {
        "id": str,
        "modelId": str,
        "layer": str,
        "index": str,
        "description": str,
        "authorId": str,
        "notes": str,
        "typeName": None,
        "explanationModelName": None,
    },
}
"""Columns of Neuronpedia's tables Neuron, Activation and Explanation and their types; None is a column that we leave null."""
METADATA = {
    "release.jsonl": {"name", "description", "creatorName", "creatorId"},
    "model.jsonl": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset.jsonl": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source.jsonl": {"id", "modelId", "setName", "creatorId"},
}
"""Columns without a default of its tables SourceRelease, Model, SourceSet and Source."""
OPTIONAL = {
    "release.jsonl": """visibility isNewUi featured descriptionShort urls creatorEmail creatorNameShort defaultSourceSetName
        defaultSourceId defaultUmapSourceIds createdAt""",
    "model.jsonl": """displayNameShort displayName tlensId dimension visibility defaultSourceSetName defaultSourceId
        inferenceEnabled instruct createdAt updatedAt website""",
    "sourceset.jsonl": """hasDashboards visibility type urls creatorEmail releaseName defaultOfModelId defaultRange
        defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt""",
    "source.jsonl": """hasDashboards inferenceEnabled saelensConfig saelensRelease saelensSaeId hfRepoId hfFolderId visibility
        defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters num_prompts num_tokens_in_prompt dataset notes createdAt""",
}
"""Their other columns, as long as they were there in all versions that we know: a row with any other is not created."""


def config_of(suite: Path, out: Path | None = None, **fields: Any) -> NeuronpediaConfig:
    return NeuronpediaConfig(suite=suite, out=out or suite.parent / "out", **fields)


def unpacked(root: Path) -> dict[str, bytes]:
    """Every file below `root`, by path; gzipped ones unpacked, without their .gz."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        found[name.removesuffix(".gz")] = gzip.decompress(content) if name.endswith(".gz") else content
    return found


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a kind as the importer reads them."""
    files = sorted((folder / kind).glob("*"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    texts = [gzip.decompress(path.read_bytes()).decode().replace("\\u0000", " ") for path in files]
    return [json.loads(line) for text in texts for line in text.strip().split("\n")]


def without_sizes(name: str, content: bytes) -> bytes:
    """Manifests tell the size of packed files, which is zlib's affair."""
    if not name.startswith("sources/"):
        return content
    manifest = json.loads(content)
    manifest["files"] = sorted(manifest["files"])
    manifest["counts"].pop("bytes")
    manifest.pop("identity")  # of the Parquet files' bytes, which are Arrow's
    return json.dumps(manifest, indent=1).encode() + b"\n"


def test_exact_files(suite: Path, tmp_path: Path):
    """EVERYSCOPE_WRITE_GOLDEN=1 rewrites them."""
    export.run(config_of(suite, tmp_path / "out", urls=("https://example.org/paper",), hf_repo="org/scope"))
    got = {name: without_sizes(name, content) for name, content in unpacked(tmp_path / "out").items()}
    if os.environ.get("EVERYSCOPE_WRITE_GOLDEN"):
        shutil.rmtree(GOLDEN, ignore_errors=True)
        for name, content in got.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_bytes(content)
    wanted = {path.relative_to(GOLDEN).as_posix(): path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}
    assert sorted(got) == sorted(wanted)
    for name in wanted:
        assert got[name].decode().split("\n") == wanted[name].decode().split("\n"), name


def test_a_second_export_has_equal_bytes_and_a_repeated_one_writes_nothing(suite: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert export.run(config_of(suite, first)).num_skipped == 0
    export.run(config_of(suite, second))
    bytes_of = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert bytes_of == {path.relative_to(second): path.read_bytes() for path in second.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in first.glob("v1/**/*")}
    again = export.run(config_of(suite, first))
    assert again.num_skipped == 3
    assert times == {path: path.stat().st_mtime_ns for path in first.glob("v1/**/*")}
    assert again.total("latents") == 18


def test_rows_have_the_columns_of_neuronpedias_tables(suite: Path, tmp_path: Path):
    export.run(config_of(suite, tmp_path / "out"))
    for source in (tmp_path / "out/v1/some-model").iterdir():
        for kind, columns in COLUMNS.items():
            if not (source / kind).exists():
                assert kind == "explanations"
                continue
            for row in lines(source, kind):
                assert set(row) == set(columns)
                for name, value in row.items():
                    assert is_of(value, columns[name]), (kind, name, value)
        for name, needed in METADATA.items():
            (row,) = [json.loads(line) for line in (source / name).read_text().splitlines()]
            assert needed <= set(row) <= needed | set(OPTIONAL[name].split())
            assert None not in row.values()


def is_of(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of(item, kind[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def test_examples_are_those_of_the_suite(suite: Path, tmp_path: Path):
    """Tokens, values and places read back exactly as they stand in latents.parquet and text/."""
    export.run(config_of(suite, tmp_path / "out"))
    vocabulary = pyarrow.parquet.read_table(suite / "text/vocabulary.parquet")["text"].to_pylist()
    blocks = pyarrow.parquet.read_table(suite / "text/sequences.parquet").to_pylist()
    shown = [(text.replace("\0", " ") or "⟨empty⟩") for text in vocabulary]
    shown = [text if len(text) <= 100 else f"{text[:99]}…" for text in shown]
    table = pyarrow.parquet.read_table(suite / "attn_out/layer_1/width_6/average_l0_2/latents.parquet").to_pylist()
    rows = lines(tmp_path / "out/v1/some-model/1-golden-scope-att-6", "activations")
    wanted = [(latent["latent"], example) for latent in table for example in latent["examples"]]
    assert len(rows) == len(wanted) > 0
    assert len({row["id"] for row in rows}) == len(rows)
    assert {len(row["id"]) for row in rows} == {25}
    for row, (latent, example) in zip(rows, wanted, strict=True):
        block = blocks[example["sequence"]]
        start, values = example["start"], example["activations"]
        assert row["index"] == str(latent)
        assert row["tokens"] == [shown[token] for token in block["input_ids"][start : start + len(values)]]
        assert np.array(row["values"]).astype(np.float16).tolist() == values
        assert row["dataIndex"] == f"{example['sequence']}:{start}"
        assert row["qualifyingTokenIndex"] == example["position"] - start
        assert row["maxValueTokenIndex"] == int(np.argmax(values))
        assert np.float16(row["maxValue"]) == max(values)
        assert row["dataSource"] == block["documents"][int(example["position"] >= block["document_starts"][1])]


def test_bins_hold_their_examples_and_lie_side_by_side(suite: Path, tmp_path: Path):
    """The strongest are in a bin from -1; of the others, each has its value in its bin, and the shares of the fifths are 1."""
    export.run(config_of(suite, tmp_path / "out"))
    path = suite / "attn_out/layer_1/width_6/average_l0_2/latents.parquet"
    firings = pyarrow.parquet.read_table(path)["firings"].to_pylist()
    by_latent: dict[str, list[dict[str, Any]]] = {}
    for row in lines(tmp_path / "out/v1/some-model/1-golden-scope-att-6", "activations"):
        by_latent.setdefault(row["index"], []).append(row)
    assert sorted(by_latent) == ["0", "1", "2", "3", "4"]  # the last is dead
    for rows in by_latent.values():
        top, fifths = rows[:2], rows[2:]
        assert {(row["binMin"], row["binContains"]) for row in top} == {(-1, -1)}
        assert all(row["maxValue"] <= row["binMax"] for row in top)
        for row in fifths:
            own = row["values"][row["qualifyingTokenIndex"]]
            assert row["binMin"] * (1 - 1e-4) <= own <= row["binMax"] * (1 + 1e-4)  # five and six digits
        assert [row["binMin"] for row in fifths[:-1]] == [row["binMax"] for row in fifths[1:]]
        count = firings[int(fifths[0]["index"])]
        shares = np.diff(np.arange(6) * count // 5) / count
        assert [row["binContains"] for row in fifths] == pytest.approx(shares, abs=1e-5)


def test_features_are_every_latent_once(suite: Path, tmp_path: Path):
    export.run(config_of(suite, tmp_path / "out"))
    rows = lines(tmp_path / "out/v1/some-model/0-golden-scope-res-6__l0-4", "features")
    assert [row["index"] for row in rows] == [str(latent) for latent in range(6)]
    assert rows[5]["maxActApprox"] == rows[5]["frac_nonzero"] == 0
    assert rows[5]["pos_str"] == rows[5]["freq_hist_data_bar_heights"] == []
    table = pyarrow.parquet.read_table(suite / "resid_post/layer_0/width_6/average_l0_4/latents.parquet").to_pylist()
    for row, latent in zip(rows[:5], table[:5], strict=True):
        assert row["freq_hist_data_bar_heights"] == latent["histogram"]
        assert len(row["freq_hist_data_bar_values"]) == len(latent["histogram"])
        own = [its for its in latent["neighbours"] if its["relation"] == 0]
        assert row["topkCosSimIndices"] == [its["latent"] for its in own]
        (company,) = latent["cofiring"]
        cosine = company["count"] / np.sqrt(latent["firings"] * table[company["latent"]]["firings"] or 1)
        assert row["correlated_features_l1"] == pytest.approx([cosine], rel=1e-3)


def test_labels_carry_their_scores(suite: Path, tmp_path: Path):
    export.run(config_of(suite, tmp_path / "out"))
    rows = lines(tmp_path / "out/v1/some-model/1-golden-scope-att-6", "explanations")
    assert [row["index"] for row in rows] == ["0", "0", "1", "2", "3", "4", "4"]
    assert len({row["id"] for row in rows}) == len(rows)
    assert rows[0]["description"] == "label 0 of ` ` and \\u0000"
    assert "detection 0.75 (0.75 to 0.75), labels of other latents 0.50" in rows[0]["notes"]


@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 1024, 70_000, 2**20, 2**24])
def test_no_width_makes_too_many_files(width: int, kinds: int):
    for wanted in (1, 128, 1024):
        each = latents_per_file(width, kinds, wanted)
        assert each >= wanted
        assert kinds * -(-width // each) + 4 <= MAX_FILES


def test_limits_hold_for_many_latents_and_long_tokens(make_suite: Callable[..., Path], tmp_path: Path):
    """70,000 latents at one latent a file, tokens of 10,000 characters: EVERYSCOPE_NEURONPEDIA_LATENTS makes it a million."""
    tokens = ("x" * 10_000, "é" * 10_000, "y", "z")
    suite = make_suite({"site": Site("resid_post", 0), "width": MANY, "l0": 9.0}, tokens=tokens, window=2, examples=1)
    config = config_of(suite, tmp_path / "out", latents_per_file=1, max_file_bytes=2**22, max_body_bytes=2**20)
    result = export.run(config)
    folder = next((tmp_path / "out/v1/some-model").iterdir())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) <= MAX_FILES
    assert result.total("files") == len(files)
    seen, num_activations = np.zeros(MANY, int), 0
    for path in files:
        if path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
            assert 0 < len(content) <= 2**22
            if path.parent.name == "features":
                np.add.at(seen, [int(number) for number in re.findall(rb'"index":"(\d+)"', content)], 1)
            num_activations += content.count(b"\n") if path.parent.name == "activations" else 0
    assert (seen == 1).all()
    assert num_activations == result.total("activations") == MANY - MANY // 6
    alive = np.zeros(MANY, int)
    for path in (tmp_path / "out/upload").rglob("batch-*.json"):
        assert path.stat().st_size <= 2**20
        content = path.read_bytes()
        np.add.at(alive, [int(number) for number in re.findall(rb'"index":(\d+)', content)], 1)
        if path.stem.endswith("0"):
            check_body(json.loads(content))
    np.testing.assert_array_equal(alive, np.arange(MANY) % 6 != 5)


def check_body(body: dict[str, Any]) -> None:
    """Fail where a body is not what the API's own schema takes."""
    assert set(body) == {"modelId", "source", "features"}
    assert body["modelId"] == body["modelId"].lower()
    assert body["source"] == body["source"].lower()
    assert 1 <= len(body["features"]) <= 128
    indices = [feature["index"] for feature in body["features"]]
    assert len(set(indices)) == len(indices)
    for feature in body["features"]:
        assert type(feature["index"]) is int
        assert 0 <= feature["index"] <= 10_000_000
        assert 0 <= feature["density"] <= 1
        assert max(len(feature["topLogits"]), len(feature["bottomLogits"])) <= 20
        for explanation in feature["explanations"]:
            assert 1 <= len(explanation["text"]) <= 512
        assert feature["activations"]
        for activation in feature["activations"]:
            assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024
            assert all(isinstance(token, str) and 1 <= len(token) <= 100 and "\0" not in token for token in activation["tokens"])
            assert all(isinstance(value, int | float) for value in activation["values"])
            assert activation["quantileMin"] <= activation["quantileMax"] <= 99_999_999
            assert activation["quantileFraction"] is None or 0 <= activation["quantileFraction"] <= 1


def test_bodies_are_what_the_api_takes(suite: Path, tmp_path: Path):
    """Only living latents of the SAEs that stand for their layer and set, each once."""
    export.run(config_of(suite, tmp_path / "out"))
    bodies = {path.parent.name: read_json(path) for path in (tmp_path / "out/upload").rglob("batch-*.json")}
    assert sorted(bodies) == ["0-golden-scope-res-6", "1-golden-scope-att-6"]
    for body in bodies.values():
        check_body(body)
        assert [feature["index"] for feature in body["features"]] == [0, 1, 2, 3, 4]
    assert read_json(tmp_path / "out/upload/some-model/sets/golden-scope-att-6.json") == {
        "name": "golden-scope-att-6",
        "modelId": "some-model",
        "description": "Attention Out - 6",
    }


def test_bodies_are_those_of_neuronpedias_own_client(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its classes, filled with what we have, send what we have written."""
    why = "the package neuronpedia, which Neuronpedia publishes, is not installed"
    client = pytest.importorskip("neuronpedia.requests.feature_request", reason=why)
    kinds = importlib.import_module("neuronpedia.np_feature")
    sent = []
    monkeypatch.setattr(client.FeatureRequest, "send_request", lambda self, **request: sent.append(request["json"]))
    export.run(config_of(suite, tmp_path / "out"))
    bodies = [read_json(path) for path in sorted((tmp_path / "out/upload").rglob("batch-*.json"))]
    for body in bodies:
        features = []
        for its in body["features"]:
            place = (body["modelId"], body["source"], its["index"])
            activations = [kinds.Activation(*place, **activation) for activation in its["activations"]]
            labels = [(label["text"], label["methodName"], label["modelName"]) for label in its["explanations"]]
            logits = [[kinds.Logit(**logit) for logit in its[name]] for name in ("topLogits", "bottomLogits")]
            explanations = [kinds.Explanation(*place, *label) for label in labels]
            features.append(kinds.Feature(*place, its["density"], *logits, explanations, activations))
        client.FeatureRequest(api_key="none").upload_batch(body["modelId"], body["source"], features)
    assert sent == bodies


def test_examples_that_do_not_fit_into_a_body_are_left_out_weakest_first(make_suite: Callable[..., Path], tmp_path: Path):
    tokens = tuple("\x01" * (10 + number) for number in range(60))
    suite = make_suite({"site": Site("resid_post", 0), "width": 2, "l0": 1.0}, tokens=tokens, window=1100, context=1200, blocks=2)
    export.run(config_of(suite, tmp_path / "out", max_body_bytes=2**20))
    bodies = [read_json(path) for path in sorted((tmp_path / "out/upload").rglob("batch-*.json"))]
    for body in bodies:
        check_body(body)
    kept = [feature["activations"] for body in bodies for feature in body["features"]]
    rows = lines(next((tmp_path / "out/v1/some-model").iterdir()), "activations")
    assert len(rows) == 14
    for latent, each in enumerate(kept):
        whole = [row for row in rows if row["index"] == str(latent)]
        assert 2 < len(each) < len(whole)
        assert [its["values"] for its in each] == [row["values"] for row in whole[: len(each)]]
        assert all(len(row["tokens"]) == 1024 and row["values"][row["qualifyingTokenIndex"]] > 0 for row in whole)


def test_rows_that_need_too_many_or_too_large_files_are_refused(
    make_suite: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    suite = make_suite({"site": Site("resid_post", 0), "width": 12, "l0": 9.0}, window=16)
    config = config_of(suite, tmp_path / "out")
    with pytest.raises(DataError, match="a file holds 500; raise --max-file-bytes"):
        export.run(config.model_copy(update={"max_file_bytes": 500}))
    many = config.model_copy(update={"max_file_bytes": 4000})
    files = export.run(many).total("files")
    assert files > 10
    shutil.rmtree(config.out)
    monkeypatch.setattr(export, "MAX_FILES", files - 1)
    with pytest.raises(DataError, match=f"has {files} files, it may have {files - 1}; raise"):
        export.run(many)
    assert not list((config.out / "sources").glob("*"))


def test_a_killed_export_goes_on_and_strays_are_removed(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    export.run(config_of(suite, whole))
    count, original = [0], Batches.write

    def dies(self: Batches, latent: int, rows: Sequence[str]) -> None:
        count[0] += 1
        if count[0] == 3 * 6 + 5:
            raise KeyboardInterrupt
        original(self, latent, rows)

    monkeypatch.setattr(Batches, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        export.run(config_of(suite, out))
    monkeypatch.setattr(Batches, "write", original)
    assert not list(out.rglob("*.partial"))
    stray = out / "v1/some-model/0-golden-scope-res-6/features/batch-7.jsonl.gz"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"of an earlier run")
    assert export.run(config_of(suite, out)).num_skipped == 1
    assert unpacked(out) == unpacked(whole)


def test_a_file_that_was_cut_is_written_again(suite: Path, tmp_path: Path):
    out = tmp_path / "out"
    export.run(config_of(suite, out))
    before = unpacked(out)
    (out / "v1/some-model/1-golden-scope-att-6/features/batch-0.jsonl.gz").write_bytes(b"")
    assert export.run(config_of(suite, out)).num_skipped == 2
    assert unpacked(out) == before


def test_other_settings_write_again(suite: Path, tmp_path: Path):
    out = tmp_path / "out"
    export.run(config_of(suite, out))
    assert export.run(config_of(suite, out, creator_id="cother")).num_skipped == 0
    assert export.run(config_of(suite, out, creator_id="cother", retries=1)).num_skipped == 3


def test_what_is_not_described_is_one_clear_error(make_suite: Callable[..., Path], tmp_path: Path):
    suite = make_suite({"site": Site("resid_post", 0), "width": 6, "l0": 2.0, "is_explained": False}, is_described=False)
    with pytest.raises(DataError, match="everyscope describe"):
        export.run(config_of(suite, tmp_path / "out"))
    shutil.rmtree(suite / "text")
    with pytest.raises(DataError, match=r"text/vocabulary.parquet: missing.*everyscope describe"):
        export.run(config_of(suite, tmp_path / "out"))
    with pytest.raises(ConfigError, match="no such folder"):
        export.run(config_of(tmp_path / "nowhere", tmp_path / "out"))


@pytest.mark.parametrize("name", ["latents.parquet", "explanations.parquet", "cfg.json"])
def test_a_damaged_file_is_one_clear_error(suite: Path, tmp_path: Path, name: str):
    path = suite / "attn_out/layer_1/width_6/average_l0_2" / name
    path.write_bytes(path.read_bytes()[:-9] + b"scribbled")
    with pytest.raises(DamagedData, match=name):
        export.run(config_of(suite, tmp_path / "out"))


@pytest.mark.parametrize(
    ("field", "value"), [("sequence", 99), ("sequence", -1), ("start", 23), ("position", 0), ("group", 9), ("start", -1)]
)
def test_examples_that_point_nowhere_are_one_clear_error(suite: Path, tmp_path: Path, field: str, value: int):
    path = suite / "attn_out/layer_1/width_6/average_l0_2/latents.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[0]["examples"][1][field] = value
    if field == "position":
        rows[0]["examples"][1]["start"] = 5
    write_table(path, pyarrow.Table.from_pylist(rows, table.schema))
    forge(suite, path)
    with pytest.raises(DamagedData, match="outside of the text"):
        export.run(config_of(suite, tmp_path / "out"))


def test_tokens_that_no_vocabulary_has_are_one_clear_error(suite: Path, tmp_path: Path):
    path = suite / "attn_out/layer_1/width_6/average_l0_2/latents.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[0]["top_logits"][0]["token"] = 10**6
    write_table(path, pyarrow.Table.from_pylist(rows, table.schema))
    forge(suite, path)
    with pytest.raises(DamagedData, match=r"latents\.parquet"):
        export.run(config_of(suite, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("latents.parquet", "max_activation", float("nan")),
        ("latents.parquet", "frequency", float("inf")),
        ("latents.parquet", "histogram", [1, None, 2]),
        ("explanations.parquet", "latent", None),
        ("text/sequences.parquet", "input_ids", None),
        ("text/sequences.parquet", "input_ids", [1, None]),
        ("text/sequences.parquet", "document_starts", [None]),
        ("text/vocabulary.parquet", "token", None),
        ("text/vocabulary.parquet", "token", 2**31 - 1),
    ],
)
def test_numbers_that_are_missing_or_no_numbers_are_one_clear_error(suite: Path, tmp_path: Path, name: str, column: str, value):
    path = suite / name if name.startswith("text/") else suite / "attn_out/layer_1/width_6/average_l0_2" / name
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[0][column] = value
    write_table(path, pyarrow.Table.from_pylist(rows, table.schema))
    forge(suite, path)
    with pytest.raises(DamagedData, match=path.name.replace(".", r"\.")):
        export.run(config_of(suite, tmp_path / "out"))


def forge(suite: Path, path: Path) -> None:
    """Let suite.json say that `path` is as it was published."""
    index = read_sealed(suite / "suite.json")
    for sae in index["saes"]:
        if path.parent == suite / sae["folder"]:
            sae["files"][path.name] = sha256(path)
    write_sealed(suite / "suite.json", index)
