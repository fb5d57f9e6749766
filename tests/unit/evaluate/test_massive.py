"""Massive rows: left clean in every spliced pass, in no number but plain FVU, however many they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from small_scope import ALPHABET, CONTEXT, random_sae
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from everyscope.evaluate import run as evaluate
from everyscope.evaluate.calibration import CalibrationSums, calibrate, limit_of
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.held_out import Batch, read_held_out
from everyscope.evaluate.passes import clean_pass, site_rows, spliced_logits
from everyscope.evaluate.table import score_rows, score_table
from everyscope.sae.files import write_sae
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig
from everyscope.text.tokenizer import load_tokenizer

SITE, D_IN, WIDTH = Site("resid_post", 0), 16, 48


def sinking_model(folder: Path, factor: float) -> None:
    """A random GPT-2 in which the embedding of one token, " the", is `factor` times as long; its files, and the tokenizer's."""
    tokenizer = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=D_IN,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[sink_of(tokenizer)] *= factor
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sink_of(tokenizer) -> int:
    return tokenizer(" the", add_special_tokens=False)["input_ids"][0]


@pytest.fixture(scope="module", params=[0.03, 0.0005], ids=["one in 30", "fewer than one in 1,000"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An evaluation of one random SAE of the sinking model, on text in which such a share of words is the sink."""
    root = tmp_path_factory.mktemp("sinks")
    sinking_model(root / "model", 2000.0)
    words, draw = [word for word in ALPHABET if word != "the"], np.random.default_rng(0)
    (root / "text").mkdir()
    for number in range(80):
        chosen = draw.choice(words, 60).tolist()
        for place in range(len(chosen)):
            if draw.random() < request.param:
                chosen[place] = "the"
        (root / "text" / f"{number:03d}.txt").write_text(" ".join(chosen))
    (root / "text" / "surely.txt").write_text("value of the name in the list is the path " * 2)
    text = TextConfig(source="files", paths=(root / "text",), context=CONTEXT, held_out_fraction=0.5)
    config = EvaluateConfig(
        model=ModelConfig(name=str(root / "model")),
        text=text,
        trained=root / "train",
        out=root / "scores",
        num_sequences=100,
        batch_blocks=8,
        calibration_sequences=100,
        uniformity_sequences=4,
        baseline_sequences=20,
        resamples=200,
    )
    calibration = calibrate(config, [SITE], load_language_model(config.model))[SITE]
    rows, is_sink, _ = held_out_rows(config)
    sae = random_sae(D_IN, WIDTH, 0.5 * float(calibration.rows.std()), calibration.mean.float(), seed=0)
    write_sae(root / "train" / SITE.folder / "w48", knowing(sae, rows[is_sink].mean(0)), {})
    evaluate.run(config)
    return config


def knowing(sae: Sae, sink: Tensor) -> Sae:
    """The SAE with one latent more, which fires on rows like the sink's alone and makes their reconstruction exact."""
    unit, rest = sink / sink.norm(), (sink - sae(sink)) / sink.norm()
    return Sae(
        torch.cat([sae.W_enc, unit[:, None]], dim=1),
        torch.cat([sae.W_dec, rest[None]]),
        torch.cat([sae.b_enc, torch.zeros(1)]),
        sae.b_dec,
        torch.cat([sae.threshold, sink.norm()[None] / 2]),
    )


def metrics(config: EvaluateConfig) -> dict:
    return json.loads((config.out / SITE.folder / "w48" / "metrics.json").read_text())


def held_out_rows(config: EvaluateConfig) -> tuple[Tensor, Tensor, Batch]:
    """All unmasked rows, float64, whether each is the sink's, and the batch that they are of."""
    held_out, language = read_held_out(config), load_language_model(config.model)
    (batch,) = held_out.batches([range(held_out.num_sequences)], torch.device("cpu"))
    rows = capture(language.model, [SITE], batch.input_ids)[SITE][batch.mask]
    return rows, batch.input_ids[batch.mask] == sink_of(load_tokenizer(config.model.name)), batch


def fvu(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_usual_fvu_is_that_of_ordinary_tokens_by_hand(config: EvaluateConfig):
    rows, is_sink, _ = held_out_rows(config)
    sae, scores = next(iter(evaluate.load_targets(config))).sae(), metrics(config)
    x_hat = sae(rows)
    assert scores["massive"]["num_tokens"] == int(is_sink.sum()) > 0
    assert scores["fvu_usual"] == pytest.approx(fvu(rows[~is_sink], x_hat[~is_sink]), rel=1e-6)
    assert scores["fvu"] == pytest.approx(fvu(rows, x_hat), rel=1e-6)
    assert scores["fvu"] < 0.01 < 0.3 < scores["fvu_usual"]  # plain FVU looks superb, and speaks of the sink
    firings = (sae.encode(rows) > 0).sum(1).double()
    assert scores["l0"] == pytest.approx(float(firings[~is_sink].mean()))
    assert scores["massive"]["l0"] == pytest.approx(float(firings[is_sink].mean()))
    squares = rows.double().square().sum(1)
    assert scores["massive"]["share_of_squares"] == pytest.approx(float(squares[is_sink].sum() / squares.sum()))
    assert scores["num_tokens"] == len(rows) == scores["num_usual_tokens"] + int(is_sink.sum())
    assert sum(scores["by_position"]["count"]) == scores["num_usual_tokens"]
    low, high = scores["intervals"]["fvu_usual"]
    assert low <= scores["fvu_usual"] <= high


def test_baselines_are_fitted_to_and_measured_on_usual_tokens(config: EvaluateConfig):
    rows, is_sink, _ = held_out_rows(config)
    calibration = calibrate(config, [SITE], load_language_model(config.model))[SITE]
    scores, usual = metrics(config), rows[~is_sink].double()
    size = round(scores["l0"])
    kept = calibration.components[:, :size]
    assert not (calibration.rows.norm(dim=1) > calibration.norm_limit).any()
    for its, some in (("fvu_usual", usual), ("fvu", rows.double())):
        x_hat = calibration.mean + (some - calibration.mean) @ kept @ kept.T
        assert scores["baselines"]["pca"][its] == pytest.approx(fvu(some, x_hat), rel=1e-6)
        mean = calibration.mean.expand_as(some)
        assert scores["baselines"]["mean"][its] == pytest.approx(fvu(some, mean), rel=1e-6)
    assert scores["fvu_pca_usual"] == scores["baselines"]["pca"]["fvu_usual"]
    assert scores["baselines"]["mean"]["fvu_usual"] == pytest.approx(1, abs=0.02)


def test_massive_rows_stay_clean_when_an_sae_is_spliced_in(config: EvaluateConfig):
    """With zeros everywhere else, the logits are those of a model whose site holds the sinks' own rows and zeros."""
    _, is_sink, batch = held_out_rows(config)
    language = load_language_model(config.model)
    clean = clean_pass(language.model, [SITE], batch)
    limit = float(calibrate(config, [SITE], language)[SITE].norm_limit)
    here = site_rows(clean.activations[SITE], batch, limit)
    assert torch.equal(~here.is_usual, is_sink)
    assert torch.equal(here.mask[batch.mask], ~is_sink)
    assert not here.mask[~batch.mask].any()
    with torch.no_grad():
        got = spliced_logits(language.model, batch.input_ids, SITE, torch.zeros_like(here.usual), here.mask, clean.activations)
        want = clean.activations[SITE].clone()
        want[here.mask] = 0
        whole = spliced_logits(language.model, batch.input_ids, SITE, want[batch.mask], batch.mask, clean.activations)
    assert torch.equal(got, whole)


def test_the_terminal_names_massive_tokens_and_shows_both_fvus(config: EvaluateConfig):
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(score_table(score_rows(config)))
    text, scores = console.export_text(), metrics(config)
    assert "…" not in text
    assert "Massive tokens: at resid_post/layer_0" in text
    assert f"{scores['fvu']:.3f}" in text
    assert f"{scores['fvu_usual']:.3f}" in text
    assert "resid_post/layer_0 " in text
    assert "w48 " in text


def test_without_a_rule_every_row_counts(config: EvaluateConfig, tmp_path: Path):
    rows, _, _ = held_out_rows(config)
    every = config.model_copy(update={"max_norm": None, "out": tmp_path})
    evaluate.run(every)
    scores = metrics(every)
    assert scores["massive"]["num_tokens"] == 0
    assert scores["massive"]["norm_limit"] is None
    assert scores["fvu"] == scores["fvu_usual"] == pytest.approx(metrics(config)["fvu"], rel=1e-6)
    assert scores["intervals"]["fvu"] == scores["intervals"]["fvu_usual"]
    assert scores["fvu_pca"] == scores["fvu_pca_usual"]
    assert scores["num_usual_tokens"] == scores["num_tokens"] == len(rows)


def test_a_limit_that_no_row_passes_changes_no_number(tmp_path: Path, config: EvaluateConfig):
    """Bit for bit: the rule costs nothing where there is nothing to leave out."""
    found = []
    for max_norm in (None, 1e9):
        other = config.model_copy(update={"max_norm": max_norm, "out": tmp_path / str(max_norm)})
        evaluate.run(other)
        scores = metrics(other)
        for name in ("evaluation", "massive", "identity"):
            del scores[name]
        found.append(scores)
    assert found[0] == found[1]


def test_the_limit_comes_from_the_first_rows_alone_and_massive_ones_are_in_no_figure():
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(5000, 6, generator=generator) + 3
    massive = 500 * torch.randn(40, 6, generator=generator)
    limit = limit_of([usual[:3000], massive, usual[3000:]], 8.0)
    median = float(usual.norm(dim=1).median())
    assert 8 * median / 1.3 < limit < 8 * median * 1.3
    sums, alone = CalibrationSums(limit), CalibrationSums()
    for part in (usual[:1000], massive, usual[1000:]):
        sums.update(part)
    alone.update(usual[:1000])
    alone.update(usual[1000:])
    for name in ("mean", "components", "rows"):
        assert torch.equal(getattr(sums.finish(), name), getattr(alone.finish(), name))
    assert limit_of([usual], None) == limit_of([], 8.0) == torch.inf
