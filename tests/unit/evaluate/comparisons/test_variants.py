"""Widths, subsets, precision, transfer and the random model, over a whole little suite."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from small_scope import tree_bytes
from transformers import AutoTokenizer

from everyscope.base.errors import DataError
from everyscope.evaluate import run as evaluate
from everyscope.evaluate.comparisons import precision, random_model, subsets, transfer, widths
from everyscope.evaluate.comparisons.config import (
    PrecisionConfig,
    RandomModelConfig,
    Subset,
    SubsetsConfig,
    TransferConfig,
    WidthsConfig,
    built_in_subsets,
)
from everyscope.evaluate.comparisons.scored import read_scored
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig


def content(path: Path) -> dict:
    return json.loads(path.read_text())


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))


def test_widths_are_compared_where_both_have_been(scratch: EvaluateConfig):
    groups = content(widths.run(WidthsConfig(evaluate=scratch)))["groups"]
    scored = read_scored(scratch)
    assert groups
    for group in groups:
        assert [point["width"] for point in group["points"]] == [16, 48]
        for point in group["points"]:
            its = sorted(
                (one.l0, one.fvu_usual) for one in scored if (one.site.folder, one.width) == (group["site"], point["width"])
            )
            assert its[0][0] <= group["l0"] <= its[-1][0]
            around = [fvu for l0, fvu in its]
            assert min(around) - 1e-12 <= point["fvu_usual_at_l0"] <= max(around) + 1e-12
    given = content(widths.run(WidthsConfig(evaluate=scratch, l0s=(1e6,))))["groups"]
    assert {point["fvu_usual_at_l0"] for group in given for point in group["points"]} == {None}


def test_comparisons_need_the_scores_of_just_this_evaluation(scratch: EvaluateConfig):
    with pytest.raises(DataError, match="run `everyscope evaluate` first"):
        widths.run(WidthsConfig(evaluate=scratch.model_copy(update={"num_sequences": 15})))


def test_subsets_are_evaluated_each_on_its_own_text(scratch: EvaluateConfig, monkeypatch: pytest.MonkeyPatch):
    own = Subset(name="own", text=scratch.text)
    arithmetic = Subset(name="sums", text=TextConfig(source="arithmetic", context=24), description="invented")
    config = SubsetsConfig(evaluate=scratch, canonical_l0=6, subsets=(own, arithmetic), num_sequences=scratch.num_sequences)
    path = subsets.run(config)
    found = content(path)["subsets"]
    assert [(subset["name"], len(subset["rows"])) for subset in found] == [("own", 4), ("sums", 4)]
    assert found[1]["description"] == "invented"
    assert found[0]["description"]
    scores = {one.name: one for one in read_scored(scratch)}
    for row in found[0]["rows"]:
        one = scores[row["sae"]]
        assert row["site"] == one.site.folder
        assert [row[key] for key in ("l0", "fvu", "delta_loss")] == pytest.approx([one.l0, one.fvu, one.delta_loss])
        assert row["intervals"].keys() == one.metrics["intervals"].keys()
    assert found[1]["rows"][0]["fvu"] != found[0]["rows"][0]["fvu"]
    before = tree_bytes(scratch.out)
    forbid_models(monkeypatch)
    subsets.run(config)
    assert tree_bytes(scratch.out) == before


def test_conditions_may_read_fewer_blocks_than_the_evaluation(scratch: EvaluateConfig):
    config = SubsetsConfig(evaluate=scratch, canonical_l0=6, subsets=(Subset(name="own", text=scratch.text),), num_sequences=4)
    few = content(subsets.run(config))["subsets"][0]
    assert few["num_tokens"] < next(iter(read_scored(scratch))).metrics["num_tokens"] / 2
    assert config.evaluate == scratch
    usual = config.model_copy(update={"num_sequences": None})
    for blocks, read in ((2048, 256), (64, 8), (16, 8), (5, 5)):
        assert (
            usual.model_copy(update={"evaluate": scratch.model_copy(update={"num_sequences": blocks})}).base.num_sequences == read
        )


def test_built_in_subsets_keep_the_blocks_of_the_text():
    text = TextConfig(context=77, prefix="a", suffix="b", held_out_fraction=0.2)
    for subset in built_in_subsets(text):
        assert subset.text.model_copy(update={"source": "standard_library"}) == text
    with pytest.raises(ValidationError, match="'own' is named twice"):
        SubsetsConfig(evaluate=evaluation(), subsets=(Subset(name="own", text=text),) * 2)
    with pytest.raises(ValidationError, match="name"):
        Subset(name="../elsewhere", text=text)


def evaluation() -> EvaluateConfig:
    return EvaluateConfig(model={}, text={}, trained=Path("t"), out=Path("o"))


def test_pairs_of_number_formats_are_measured(scratch: EvaluateConfig):
    rows = content(precision.run(PrecisionConfig(evaluate=scratch, canonical_l0=6, num_sequences=scratch.num_sequences)))["rows"]
    assert len(rows) == 2 * (3 + 2)
    exact = {one.name: one for one in read_scored(scratch)}
    of = {(row["sae"], row["sae_dtype"], row["model_dtype"]): row for row in rows}
    assert len(of) == len(rows)
    for name in {row["sae"] for row in rows}:
        assert exact[name].width == 16
        assert of[name, "float32", "float32"]["fvu"] == exact[name].fvu
        assert of[name, "int8", "float32"]["fvu"] == pytest.approx(exact[name].fvu, rel=0.1)
        assert of[name, "int8", "float32"]["fvu"] != exact[name].fvu
        assert of[name, "float32", "bfloat16"]["loss_clean"] != exact[name].metrics["loss_clean"]
        assert of[name, "float32", "bfloat16"]["loss_clean"] == pytest.approx(exact[name].metrics["loss_clean"], abs=0.05)


SITES = (Site("mlp_out", 1), Site("resid_post", 0))
CHAT = TextConfig(source="standard_library_instructions", context=48)


def test_transfer_tells_user_and_model_apart_and_sets_tuned_saes_beside(scratch: EvaluateConfig, tmp_path: Path):
    tuned = scratch.model.model_copy(update={"weights": "random", "weights_seed": 1})
    evaluation = scratch.model_copy(update={"sites": (SITES[0],), "model": tuned, "out": tmp_path / "tuned"})
    evaluate.run(evaluation)
    config = TransferConfig(evaluate=scratch, tuned=tuned, text=CHAT, tuned_evaluation=evaluation, canonical_l0=6)
    found = content(transfer.run(config))
    rows = found["rows"]
    assert [row["segment"] for row in rows[:3]] == ["all", "user", "model"]
    assert len({(row["name"], row["sae"], row["segment"]) for row in rows}) == len(rows) == 2 * 2 * 3
    assert {row["site"] for row in rows} == {SITES[0].folder}
    for whole, user, model in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert whole["num_tokens"] == user["num_tokens"] + model["num_tokens"]
        firings = user["l0"] * user["num_tokens"] + model["l0"] * model["num_tokens"]
        assert firings == pytest.approx(whole["l0"] * whole["num_tokens"])
        assert whole["target"] in (8.0, 9.0, 10.0)
    # the same SAEs on the same model and text, whichever folder they were taken from
    base, its = ([row for row in rows if row["sae"] == source] for source in ("base", "tuned"))
    same = {(row["name"], row["segment"]): row["fvu_usual"] for row in base}
    assert any((row["name"], row["segment"]) in same for row in its)
    assert all(same.get((row["name"], row["segment"]), row["fvu_usual"]) == row["fvu_usual"] for row in its)


def test_transfer_needs_turns_and_common_sites(scratch: EvaluateConfig, tmp_path: Path):
    config = TransferConfig(evaluate=scratch, tuned=scratch.model, text=scratch.text, canonical_l0=6)
    with pytest.raises(DataError, match="opens no turn of the model"):
        transfer.run(config)
    first, second = (scratch.model_copy(update={"sites": (site,)}) for site in SITES)
    apart = {"evaluate": first, "tuned_evaluation": second}
    with pytest.raises(DataError, match="train both on the same sites"):
        transfer.run(config.model_copy(update=apart))


def test_the_bundled_tokenizer_has_turns(scratch: EvaluateConfig):
    assert AutoTokenizer.from_pretrained(scratch.model.name).chat_template


def test_the_random_model_is_told_beside_the_suite(scratch: EvaluateConfig, tmp_path: Path):
    model = scratch.model.model_copy(update={"weights": "random"})
    other = scratch.model_copy(update={"model": model, "out": tmp_path / "random", "shards": None})
    evaluate.run(other)
    found = content(random_model.run(RandomModelConfig(evaluate=scratch, random_evaluation=other)))
    scored = read_scored(other)
    assert [(row["site"], row["width"], row["fvu"]) for row in found["rows"]] == [
        (one.site.folder, one.width, one.fvu) for one in scored
    ]
    assert {row["sae"] for row in found["rows"]} <= {one.name for one in read_scored(scratch)}
    with pytest.raises(DataError, match='expected "random"'):
        random_model.run(RandomModelConfig(evaluate=scratch, random_evaluation=scratch))
