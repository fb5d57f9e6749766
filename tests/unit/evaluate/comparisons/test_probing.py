"""Probing over a whole little suite: labels of one's own, rows that fit the model's own reading, and a second run for nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_scope import CONTEXT, tree_bytes

from everyscope.base.errors import DataError, TextError
from everyscope.base.files import write_sealed
from everyscope.evaluate.comparisons import probing
from everyscope.evaluate.comparisons.config import ProbingConfig
from everyscope.evaluate.comparisons.labels import NO_LABEL, labelled_python, read_labelled
from everyscope.evaluate.comparisons.probe_rows import activations_at, read_rows
from everyscope.evaluate.comparisons.probes import draw_rows, tasks_of
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.normalisation import NormLimits, is_massive
from everyscope.sites.capture import capture
from everyscope.sites.model import load_language_model
from everyscope.suite.scores import read_metrics
from everyscope.text.config import TextConfig
from everyscope.text.tokenizer import load_tokenizer

MARKED = {"import", "return", "for", "in", "def", "class"}


@pytest.fixture
def labels(suite: EvaluateConfig, tmp_path: Path) -> Path:
    """The suite's own text: characters of some words are labelled marked, of the others plain, spaces are not labelled."""
    lines = []
    for path in sorted(suite.text.paths[0].glob("*.txt")):
        text, names = path.read_text(), []
        for word in text.split(" "):
            names += ["marked" if word in MARKED else "plain"] * len(word) + [None]
        lines.append(json.dumps({"text": text, "labels": names[:-1]}))
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    return tmp_path / "labels.jsonl"


def settings(config: EvaluateConfig, labels: Path | None, **changes) -> ProbingConfig:
    given = {"ks": (1, 3), "train_tokens": 400, "test_tokens": 300, "min_positives": 5, "resamples": 100, "canonical_l0": 6}
    return ProbingConfig(evaluate=config, labels=labels, **(given | changes))


def test_rows_are_tokens_behind_bos_and_activations_are_the_models_own(suite: EvaluateConfig, labels: Path):
    config, tokenizer = settings(suite, labels), load_tokenizer(suite.model.name)
    rows = read_rows(read_labelled(labels), config, tokenizer, "held_out", 300)
    assert sum(map(len, rows.blocks)) == len(rows.labels) == len(rows.document) == 300
    assert max(map(len, rows.blocks)) == CONTEXT - 1
    assert (np.diff(rows.document) >= 0).all()
    words = [tokenizer.decode([token]).strip() for token in np.concatenate(rows.blocks)]
    whole = [place for place, word in enumerate(words) if word in MARKED and len(word) > 3]
    assert whole
    assert {int(rows.labels[place]) for place in whole} == {0}
    model, site = load_language_model(suite.model).model, next(iter(probing.canonical_saes(probing.read_scored(suite), 6)))[0]
    limits = NormLimits(math.inf, math.inf)
    got = torch.cat([batch[site].x for batch in activations_at(model, tokenizer, {site: limits}, rows, 4)])
    start, limit = 0, float(got.norm(dim=1).median())
    for ids in rows.blocks[:5]:
        alone = capture(model, [site], torch.tensor([[tokenizer.bos_token_id, *ids]]))[site][0, 1:]
        torch.testing.assert_close(got[start : start + len(ids)], alone, rtol=1e-4, atol=1e-4)
        start += len(ids)
    usual = [batch[site].is_usual for batch in activations_at(model, tokenizer, {site: NormLimits(limit, limit)}, rows, 4)]
    assert torch.equal(torch.cat(usual), ~is_massive(got, limit))


def test_massive_rows_are_in_no_probe(scratch: EvaluateConfig, labels: Path):
    """Half of all rows are massive at one site; there, the scores are those of probes that never saw them."""
    canonical = probing.canonical_saes(probing.read_scored(scratch), 6).values()
    one = next(one for one in canonical if one.site.kind == "resid_post")  # behind a norm, all rows are equally long
    config, model, tokenizer = (
        settings(scratch, labels),
        load_language_model(scratch.model).model,
        load_tokenizer(scratch.model.name),
    )
    corpus = read_labelled(labels)
    train, test = (read_rows(corpus, config, tokenizer, split, count) for split, count in (("train", 400), ("held_out", 300)))
    everything = NormLimits(math.inf, math.inf)
    inside, outside = (
        torch.cat([batch[one.site].x for batch in activations_at(model, tokenizer, {one.site: everything}, rows, 4)])
        for rows in (train, test)
    )
    limit = float(inside.norm(dim=1).median())
    metrics = one.target.scores / "metrics.json"
    found = read_metrics(metrics)
    write_sealed(metrics, found | {"massive": found["massive"] | {"norm_limit": limit}})
    rows = [row for row in json.loads(probing.run(config).read_text())["rows"] if row["sae"] == one.name]
    kept_inside, kept_outside = ~is_massive(inside, limit), ~is_massive(outside, limit)
    drawn = draw_rows(train.document, config.num_seeds)[:, kept_inside]
    labelled = train.labels[kept_inside.numpy()], test.labels[kept_outside.numpy()]
    tasks = tasks_of(corpus.names, *labelled, drawn, config.min_positives)
    probed = probing.Probed(config, tasks, drawn, test.document[kept_outside.numpy()])
    sae = one.target.sae()
    want = probing.sparse_scores(probed, sae.encode, sae.d_sae, inside[kept_inside], outside[kept_outside])
    assert len(want) == len(rows) > 0
    for row in rows:
        assert row["accuracy"] == pytest.approx(want[row["task"], row["k"]]["accuracy"], rel=1e-12)
        assert row["latents"] == want[row["task"], row["k"]]["latents"]


def test_splits_never_share_a_document(suite: EvaluateConfig, labels: Path):
    config, tokenizer = settings(suite, labels), load_tokenizer(suite.model.name)
    corpus = read_labelled(labels)
    texts = {}
    for split in ("train", "held_out"):
        rows = read_rows(corpus, config, tokenizer, split, 10**6)
        texts[split] = {tokenizer.decode(ids) for ids in rows.blocks}
    assert not texts["train"] & texts["held_out"]
    assert len(texts["train"]) > 10


def test_the_slice_and_its_resumption(scratch: EvaluateConfig, labels: Path, monkeypatch: pytest.MonkeyPatch):
    path = probing.run(settings(scratch, labels))
    found = json.loads(path.read_text())
    assert (found["tasks"], found["seeds"]) == (["marked", "plain"], 3)
    assert len(found["rows"]) == 4 * 2 * 2
    for row in found["rows"]:
        assert 0.3 < row["accuracy"] <= 1
        assert row["interval"] is None or row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["baseline"].keys() == {"neurons", "dense", "majority"}
        assert row["baseline"]["dense"] > 0.6
        assert len(row["latents"]) == row["k"]
    before = tree_bytes(scratch.out)
    next((scratch.out / "comparisons/probing").rglob("w48*.json")).unlink()
    path.unlink()
    probing.run(settings(scratch, labels))
    assert tree_bytes(scratch.out) == before
    monkeypatch.setattr(probing, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))
    probing.run(settings(scratch, labels))
    with pytest.raises(BaseException, match="nothing to do"):
        probing.run(settings(scratch, labels, ridge=0.1))


def test_what_cannot_be_probed_is_named(scratch: EvaluateConfig, labels: Path):
    with pytest.raises(TextError, match="no train document has labels"):
        probing.run(settings(scratch, None))  # words in a row are no Python
    with pytest.raises(DataError, match="none of marked, plain has 10000 tokens"):
        probing.run(settings(scratch, labels, min_positives=10_000))


def test_python_needs_no_labels(suite: EvaluateConfig):
    text = TextConfig(source="standard_library", context=64)
    config = settings(suite.model_copy(update={"text": text}), None, blocks_per_document=2)
    rows = read_rows(labelled_python(text), config, load_tokenizer("tiny"), "held_out", 500)
    assert rows.num_documents >= 4
    assert len(set(rows.labels.tolist()) - {NO_LABEL}) >= 5
