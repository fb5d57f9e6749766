import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_description import SITES, build_description, random_sae, write_scores
from small_scope import tree_bytes

from everyscope.base.errors import DamagedData, DataError, NonFinite, ShapeMismatch
from everyscope.base.files import read_sealed, write_sealed
from everyscope.base.tables import write_table
from everyscope.describe import run as describe
from everyscope.describe.codes import CodesFolder, encode_rows
from everyscope.describe.config import DescribeConfig
from everyscope.describe.sequences import read_sequences
from everyscope.describe.targets import NARROWER, NEXT_LAYER, PREVIOUS_LAYER, SAME, WIDER, find_targets, read_facts
from everyscope.sae.files import read_sae, write_sae
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.suite.descriptions import read_order
from everyscope.suite.latents import SCHEMA
from everyscope.text.tokenizer import load_tokenizer

ATTENTION, MLP = Site("attn_out", 1), Site("mlp_out", 0)


@pytest.fixture(scope="module")
def described(tmp_path_factory, tiny_random_model_folder) -> DescribeConfig:
    config = build_description(tmp_path_factory.mktemp("run"), tiny_random_model_folder)
    result = describe.run(config)
    assert (result.num_described, result.num_renewed, result.num_skipped) == (4 * len(SITES), 0, 0)
    return config


def rows_of(config: DescribeConfig, site: Site = MLP, name: str = "w24_0") -> list[dict]:
    return pyarrow.parquet.read_table(config.out / site.folder / name / "latents.parquet").to_pylist()


def text_rows(config: DescribeConfig, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(config.out / "text" / f"{name}.parquet").to_pylist()


def test_every_sae_is_described_and_nothing_else_is_left(described):
    files = set(tree_bytes(described.out))
    saes = {f"{site.folder}/w{width}_{number}/latents.parquet" for site in SITES for width in (24, 40) for number in (0, 1)}
    assert files == saes | {"saes.json", "text/model.json", "text/sequences.parquet", "text/vocabulary.parquet"}
    order = read_order(described.out)
    assert order == [(target.site, target.name) for target in find_targets(described)]
    assert order[:4] == [(SITES[0], "w24_1"), (SITES[0], "w24_0"), (SITES[0], "w40_1"), (SITES[0], "w40_0")]  # by width, then L0
    assert [site for site, _ in order] == sorted(site for site, _ in order)


def test_the_files_are_as_the_format_says(described):
    path = described.out / MLP.folder / "w40_0" / "latents.parquet"
    file = pyarrow.parquet.ParquetFile(path)
    assert file.schema_arrow.equals(SCHEMA)
    facts = json.loads(file.schema_arrow.metadata[b"everyscope"])
    assert facts["format"] == 1
    assert facts["context"] == described.text.context
    assert facts["num_sequences"] == len(text_rows(described, "sequences")) == 40
    assert facts["logit_path"] == "final norm's gain, unembedding"
    assert (len(facts["histogram_edges_of_max"]), len(facts["groups"])) == (31, 6)
    model = json.loads((described.out / "text/model.json").read_text())
    assert (model["num_layers"], model["d_model"], model["norm"], model["logit_softcap"]) == (2, 32, "RMSNorm", 30.0)


def test_counts_agree_with_the_saes_own_answer(described):
    """Each example's own activation is what the SAE says of the model's activation there, and firings are as often as told."""
    sae, _ = read_sae(described.trained / MLP.folder / "w24_0")
    model = describe.load_language_model(described.model).model
    sequences = text_rows(described, "sequences")
    ids = torch.tensor([row["input_ids"] for row in sequences])
    f = sae.encode(capture(model, [MLP], ids)[MLP])
    mask = torch.tensor([[token > 2 for token in row["input_ids"]] for row in sequences])
    rows = rows_of(described)
    assert [row["firings"] for row in rows] == ((f > 0) & mask[..., None]).sum((0, 1)).tolist()
    assert rows[-1]["firings"] == 0
    assert rows[-1]["examples"] == []
    assert [row["held_out_firings"] for row in rows] == list(range(24))
    for row in rows[:-1]:
        peaks = [f[example["sequence"], example["position"], row["latent"]].item() for example in row["examples"]]
        assert peaks[0] == pytest.approx(row["max_activation"], rel=1e-5)
        for example, peak in zip(row["examples"], peaks, strict=True):
            assert example["activations"][example["position"] - example["start"]] == pytest.approx(peak, rel=1e-3)


def test_neighbours_point_into_the_order(described):
    order = read_order(described.out)
    for site, wanted in ((MLP, {SAME, WIDER, NEXT_LAYER}), (ATTENTION, {SAME, WIDER}), (Site("mlp_out", 1), None)):
        relations = {its["relation"] for row in rows_of(described, site) for its in row["neighbours"]}
        assert relations == (wanted or {SAME, WIDER, PREVIOUS_LAYER})
    for its in rows_of(described, MLP, "w40_1")[0]["neighbours"]:
        site, name = order[its["sae"]]
        want = {
            SAME: (MLP, "w40_1"),
            NARROWER: (MLP, "w24_1"),  # of its two, the one of nearer L0
            NEXT_LAYER: (Site("mlp_out", 1), "w40_1"),
        }
        assert (site, name) == want[its["relation"]]


def same_but_for_rounding(got: list[dict], want: list[dict]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            if name in ("mean_activation", "max_activation", "quantiles") and value is not None:
                assert ours[name] == pytest.approx(value, rel=1e-3)
            elif name == "examples":
                places = [
                    [(its["sequence"], its["position"], its["group"], its["start"]) for its in row[name]]
                    for row in (ours, theirs)
                ]
                assert places[0] == places[1]
            elif name != "histogram":
                assert ours[name] == value, name


@pytest.mark.parametrize("change", [{"batch_blocks": 7}, {"saes_at_once": 1}, {"codes_bytes": 1}, {"portion_batches": 1}])
def test_results_do_not_depend_on_batches_and_groups(described, tmp_path, change):
    other = described.model_copy(update={"out": tmp_path, **change})
    describe.run(other)
    for name in ("w24_0", "w40_1"):
        same_but_for_rounding(rows_of(other, MLP, name), rows_of(described, MLP, name))
    if "batch_blocks" not in change:
        assert tree_bytes(tmp_path) == tree_bytes(described.out)


def test_what_is_described_is_skipped_and_an_added_sae_renews_only_surroundings(tmp_path, tiny_random_model_folder, monkeypatch):
    config = build_description(tmp_path, tiny_random_model_folder, (MLP,))
    describe.run(config)
    before, table = tree_bytes(config.out), rows_of(config)
    with monkeypatch.context() as patch:
        patch.setattr(describe, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))
        assert describe.run(config).num_skipped == 4
        assert tree_bytes(config.out) == before
        write_scores(config.scores / MLP.folder / "w24_0", 24, 24 * 0.2001)
        table_path = config.scores / MLP.folder / "w24_0" / "latents.parquet"
        write_table(table_path, pyarrow.table({"firings": np.full(24, 3), "frequency": np.full(24, 0.5)}))
        result = describe.run(config)
        assert (result.num_described, result.num_renewed, result.num_skipped) == (0, 1, 3)
    assert {row["held_out_firings"] for row in rows_of(config)} == {3}
    sae = random_sae(torch.randn(50, 32), 30, 0.9, seed=9)
    write_sae(config.trained / MLP.folder / "w30_0", sae, {})
    write_scores(config.scores / MLP.folder / "w30_0", 30, 3.0)
    result = describe.run(config)
    assert (result.num_described, result.num_renewed, result.num_skipped) == (1, 4, 0)
    for ours, theirs in zip(rows_of(config), table, strict=True):
        changed = {name for name in theirs if ours[name] != theirs[name]}
        assert changed <= {"neighbours", "held_out_firings", "held_out_frequency"}
    once = tree_bytes(config.out)
    fresh = config.model_copy(update={"out": tmp_path / "fresh"})
    describe.run(fresh)
    assert tree_bytes(fresh.out) == once


def test_what_does_not_fit_is_refused(tmp_path, tiny_random_model_folder):
    config = build_description(tmp_path, tiny_random_model_folder, (MLP,))
    with pytest.raises(DataError, match="everyscope train"):
        describe.run(config.model_copy(update={"trained": tmp_path / "nothing"}))
    with pytest.raises(DataError, match="everyscope evaluate"):
        describe.run(config.model_copy(update={"scores": tmp_path / "nothing"}))
    sae = random_sae(torch.randn(50, 5), 24, 0.9, seed=9)
    write_sae(config.trained / MLP.folder / "w24_0", sae, {})
    with pytest.raises(ShapeMismatch, match="d_in=5"):
        describe.run(config)


def test_scores_of_another_width_are_refused(tmp_path, tiny_random_model_folder):
    config = build_description(tmp_path, tiny_random_model_folder, (MLP,))
    path = config.scores / MLP.folder / "w24_0" / "latents.parquet"
    write_table(path, pyarrow.table({"firings": [1], "frequency": [0.5]}))
    with pytest.raises(DataError, match="holds 1 latents, the SAE 24"):
        describe.run(config)


def test_massive_tokens_count_as_little_as_bos(tmp_path, tiny_random_model_folder):
    """The evaluation's limit is taken: a twentieth of the tokens is above it, on which no latent fires."""
    config = build_description(tmp_path, tiny_random_model_folder, (MLP,))
    sequences = read_sequences(config, load_tokenizer(config.model.name))
    model, mask = load_language_model(config.model).model, torch.from_numpy(sequences.mask)
    batches = torch.from_numpy(sequences.input_ids).long().split(config.batch_blocks)  # in others, bits differ
    rows = torch.cat([capture(model, [MLP], batch)[MLP] for batch in batches])[mask]
    norms = rows.norm(dim=1).sort().values
    limit = float(norms[int(0.95 * len(norms)) - 1 :][:2].mean())
    for path in config.scores.rglob("metrics.json"):
        write_sealed(path, read_sealed(path) | {"massive": {"norm_limit": limit}})
    describe.run(config)
    is_usual = rows.norm(dim=1) < limit
    sae, _ = read_sae(config.trained / MLP.folder / "w24_0")
    fires = sae.encode(rows[is_usual]) > 0
    found = rows_of(config)
    assert [row["firings"] for row in found] == fires.sum(0).tolist()
    assert [row["frequency"] for row in found] == pytest.approx(fires.double().mean(0).tolist(), rel=1e-6)
    usual = {tuple(place) for place in torch.stack(torch.where(mask), dim=1)[is_usual].tolist()}
    examples = [example for row in found for example in row["examples"]]
    assert examples
    assert all((example["sequence"], example["position"]) in usual for example in examples)
    facts = read_facts(config.out / MLP.folder / "w24_0" / "latents.parquet")
    assert (facts["num_tokens"], facts["num_massive_tokens"]) == (int(is_usual.sum()), int((~is_usual).sum()))
    assert facts["num_massive_tokens"] > 0


def test_nan_is_noticed():
    sae = random_sae(torch.randn(50, 5), 8, 0.5, seed=1)
    rows = torch.randn(4, 5)
    rows[2, 1] = torch.nan
    with pytest.raises(NonFinite, match="NaN or infinity"):
        encode_rows(sae, rows, np.arange(4))


def test_chunks_of_rows_change_no_code(monkeypatch):
    sae: Sae = random_sae(torch.randn(50, 5), 8, 0.5, seed=1)
    rows, places = torch.randn(30, 5), np.arange(30) * 3 + 100
    f = sae.encode(rows)
    monkeypatch.setattr("everyscope.describe.codes.CHUNK_ACTIVATIONS", 50)
    codes = encode_rows(sae, rows, places)
    assert codes.firings.tolist() == (f > 0).sum(0).tolist()
    for latent in range(8):
        stretch = slice(codes.starts[latent], codes.starts[latent + 1])
        assert codes.places[stretch].tolist() == places[(f[:, latent] > 0).numpy()].tolist()
    assert len(encode_rows(sae, rows[:0], places[:0]).places) == 0


def test_damaged_codes_are_named(tmp_path):
    folder = CodesFolder(tmp_path / "codes", ("a",), 1)
    folder.open()
    folder.portion(0).write_bytes(b"damaged")
    with pytest.raises(DamagedData, match="portion_00000"):
        folder.read("a")
    CodesFolder(tmp_path / "codes", ("b",), 1).open()
    assert not folder.portion(0).exists()


def test_another_limit_of_what_a_transcoder_reads_is_another_description(tmp_path, tiny_random_model_folder):
    config = build_description(tmp_path, tiny_random_model_folder, (MLP,))
    for folder in (config.trained, config.scores):
        (folder / "transcoder").mkdir()
        (folder / MLP.folder).rename(folder / "transcoder" / f"layer_{MLP.layer}")

    def identities(limit: float) -> list[str]:
        for path in config.scores.rglob("metrics.json"):
            write_sealed(path, read_sealed(path) | {"massive": {"norm_limit": 5.0, "input_norm_limit": limit}})
        return [target.identity for target in find_targets(config)]

    assert identities(3.0) == identities(3.0)
    assert not set(identities(3.0)) & set(identities(4.0))
