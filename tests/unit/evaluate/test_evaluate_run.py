import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_scope import SITES, build_scope, identity_sae, random_sae, score_bytes
from transformers import AutoModelForCausalLM

from everyscope.base.errors import DataError, ModelError, NonFinite, ShapeMismatch, TextError
from everyscope.evaluate import run as evaluate
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.work import planned_blocks
from everyscope.sae.conventions import to_convention
from everyscope.sae.files import read_sae, write_sae
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites import model as language_models
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.sites.norms import mlp_norm_of
from everyscope.suite.formats import gemma_scope, gemma_scope_2, qwen_scope

SITE = Site("mlp_out", 1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    config = build_scope(tmp_path_factory.mktemp("scope"))
    result = evaluate.run(config)
    assert (result.num_evaluated, result.num_skipped) == (2 * len(SITES), 0)
    return config


def metrics(config: EvaluateConfig, site: Site, name: str = "w32_0") -> dict:
    return json.loads((config.out / site.folder / name / "metrics.json").read_text())


def copied(config: EvaluateConfig, root: Path, **changes) -> EvaluateConfig:
    """The same run with only the SAEs of one site, and scores of its own."""
    shutil.copytree(config.trained / SITE.folder, root / "train" / SITE.folder)
    return config.model_copy(update={"trained": root / "train", "out": root / "scores", **changes})


def close(got, want) -> bool:
    """Equal but for rounding: 1e-6 of a number."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(close(got[name], want[name]) for name in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(map(close, got, want))
    return got == (pytest.approx(want, rel=1e-6, abs=1e-6) if isinstance(want, float) else want)


class PassCounter:
    """Counts passes through the last module of every model that is loaded, and through the first block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heads = self.starts = 0

        def loaded(config):
            language = load_language_model(config)  # hooks come after the load's own checks
            language.model.lm_head.register_forward_hook(self._head)  # pyright: ignore[reportAttributeAccessIssue]
            language.model.model.register_forward_pre_hook(self._start)  # pyright: ignore[reportAttributeAccessIssue]
            return language

        monkeypatch.setattr(evaluate, "load_language_model", loaded)

    def _head(self, *_) -> None:
        self.heads += 1

    def _start(self, *_) -> None:
        self.starts += 1


@pytest.mark.parametrize("site", SITES, ids=str)
def test_scores_fit_together(evaluated: EvaluateConfig, site: Site):
    dense, sparse = metrics(evaluated, site, "w32_0"), metrics(evaluated, site, "w32_1")
    assert dense["l0"] > sparse["l0"] > 0
    for scores in (dense, sparse):
        assert scores["delta_loss"] == scores["loss_spliced"] - scores["loss_clean"]
        assert scores["delta_loss_zero"] == pytest.approx(scores["loss_zero_ablated"] - scores["loss_clean"], abs=1e-12)
        assert scores["kl"] > 0
        assert scores["num_tokens"] > scores["num_loss_tokens"] > 0
        assert 0 < scores["num_sequences"] <= evaluated.num_sequences
        for name, interval in scores["intervals"].items():
            if scores[name] is None:
                assert interval is None
            else:
                assert interval[0] <= scores[name] <= interval[1], name
        assert sum(scores["by_position"]["count"]) == scores["num_tokens"]
        assert sum(scores["by_position"]["loss_count"]) == scores["num_loss_tokens"]
        errors = np.dot(scores["by_position"]["count"], scores["by_position"]["error"])
        assert errors == pytest.approx(scores["mse"] * scores["num_tokens"])
        assert 0 < scores["uniformity"]["r_l0"] <= 1 + 1e-6
        assert scores["uniformity"]["effective"] <= scores["l0"] * 3
        assert scores["by_segment"] is None
        assert 0 <= scores["massive"]["share_of_squares"] < 0.5
    assert dense["loss_mean_ablated"] == sparse["loss_mean_ablated"]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_number_has_its_baselines(evaluated: EvaluateConfig, site: Site):
    scores = metrics(evaluated, site, "w32_1")
    rows = scores["baselines"]
    assert set(rows) == {"zero", "mean", "pca", "random_dictionary", "neuron_basis"}
    assert scores["fvu_pca"] == rows["pca"]["fvu"]
    assert rows["mean"]["fvu"] == pytest.approx(1, abs=0.1)  # the training mean, not the held-out one
    assert rows["mean"]["fvu"] >= 1
    assert rows["zero"]["delta_loss"] == scores["delta_loss_zero"]
    assert rows["pca"]["l0"] == rows["neuron_basis"]["l0"] == min(round(scores["l0"]), scores["d_in"])
    assert rows["random_dictionary"]["l0"] == pytest.approx(scores["l0"], abs=2.5)
    assert rows["neuron_basis"]["fvu"] < rows["random_dictionary"]["fvu"]
    assert scores["baseline_sequences"] == evaluated.baseline_sequences


def test_latents_agree_with_the_metrics(evaluated: EvaluateConfig):
    scores = metrics(evaluated, SITE)
    rows = pyarrow.parquet.read_table(evaluated.out / SITE.folder / "w32_0" / "latents.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(32))
    assert sum(row["frequency"] for row in rows) == pytest.approx(scores["l0"])
    assert sum(row["firings"] == 0 for row in rows) / 32 == scores["dead_fraction"] == scores["firing"]["dead"]
    assert all((row["mean_activation"] is None) == (row["firings"] == 0) for row in rows)
    assert sum(scores["firing"]["counts"]) == sum(row["firings"] > 0 for row in rows)


def test_scores_do_not_depend_on_the_batch_size(evaluated: EvaluateConfig, tmp_path: Path):
    other = copied(evaluated, tmp_path, batch_blocks=7, gradient_blocks=1)
    evaluate.run(other)
    got, want = metrics(other, SITE), metrics(evaluated, SITE)
    assert got.keys() == want.keys()
    for name in want.keys() - {"evaluation", "identity"}:
        assert close(got[name], want[name]), name


def test_an_added_sae_is_evaluated_alone_and_identity_costs_nothing(
    evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = copied(evaluated, tmp_path)
    evaluate.run(config)
    before = score_bytes(config.out)
    write_sae(config.trained / SITE.folder / "identity", identity_sae(16), {})
    result = evaluate.run(config)
    assert (result.num_evaluated, result.num_skipped) == (1, 2)
    scores = metrics(config, SITE, "identity")
    assert (scores["delta_loss"], scores["fvu"], scores["fvu_usual"], scores["kl"]) == (0, 0, 0, 0)
    assert scores["loss_recovered"] is scores["intervals"]["loss_recovered"] is None
    assert "mean ablation costs" in scores["loss_recovered_reason"]  # to an untrained model, no activation is worth anything
    assert (scores["intervals"]["delta_loss"], scores["l2_ratio"]) == ([0, 0], 1)
    after = score_bytes(config.out)
    assert {name: after[name] for name in before} == before
    monkeypatch.setattr(evaluate, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))
    assert evaluate.run(config).num_skipped == 3
    assert score_bytes(config.out) == after


def test_scores_of_one_site_are_those_of_the_whole_run(evaluated: EvaluateConfig, tmp_path: Path):
    for config in (copied(evaluated, tmp_path / "a"), evaluated.model_copy(update={"out": tmp_path / "b", "sites": (SITE,)})):
        assert evaluate.run(config).num_evaluated == 2
        for name in ("metrics.json", "latents.parquet"):
            place = Path(SITE.folder) / "w32_1" / name
            assert (config.out / place).read_bytes() == (evaluated.out / place).read_bytes()


def test_saes_taken_in_turns_have_the_same_scores(evaluated: EvaluateConfig, tmp_path: Path):
    config = evaluated.model_copy(update={"out": tmp_path, "saes_at_once": 3, "sites": (SITE, Site("attn_out", 0))})
    evaluate.run(config)
    want = score_bytes(evaluated.out)
    assert all(want[name] == content for name, content in score_bytes(tmp_path).items())


@pytest.mark.parametrize("saes_at_once", [None, 1])
def test_passes_are_one_clean_and_one_per_sae(
    evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saes_at_once: int | None
):
    """From scratch: 1 + S a batch, and the baselines' own, which are counted apart. With the baselines known: exactly 1 + S."""
    config = evaluated.model_copy(
        update={"out": tmp_path, "sites": (SITE,), "num_sequences": 16, "baseline_sequences": 16, "saes_at_once": saes_at_once}
    )
    turns, num_saes = (1, 2) if saes_at_once is None else (2, 2)
    counter = PassCounter(monkeypatch)
    evaluate.run(config)
    batches = 2 + 3  # four blocks two at a time for uniformity, twelve by four
    forwards = json.loads((tmp_path / "cost.json").read_text())["forwards"]
    assert forwards["clean"] == turns * batches
    assert forwards["spliced"] == num_saes * batches
    sizes = len(list((tmp_path / SITE.folder / "baselines").glob("*.safetensors"))) - 1
    assert forwards["baselines"] == 4 * (turns + 2 + sizes)
    assert counter.heads == counter.starts == forwards["clean"] + forwards["spliced"] + forwards["baselines"]

    for scores in tmp_path.rglob("metrics.json"):
        scores.unlink()
    counter = PassCounter(monkeypatch)
    evaluate.run(config)
    assert counter.heads == counter.starts == batches * (turns + num_saes)


def test_a_stop_behind_the_baselines_forgets_no_cost(evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, stopped = (copied(evaluated, tmp_path / name) for name in ("whole", "stopped"))
    evaluate.run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "_write", lambda *_: interrupt())
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(stopped)
    evaluate.run(stopped)
    costs = [json.loads((config.out / "cost.json").read_text()) for config in (whole, stopped)]
    assert [cost["forwards"] for cost in costs] == [costs[0]["forwards"]] * 2
    assert score_bytes(stopped.out) == score_bytes(whole.out)


def interrupt() -> None:
    raise KeyboardInterrupt


class Tally:
    """A bar that only counts."""

    def __init__(self) -> None:
        self.counted = self.resumed = 0

    def advance(self, amount: int, /, *, is_resumed: bool = False) -> None:
        self.counted += amount
        self.resumed += amount if is_resumed else 0


@pytest.mark.parametrize(
    "changes", [{}, {"shards": None, "calibration_sequences": 20}, {"saes_at_once": 1}, {"baseline_sequences": 0}]
)
def test_progress_counts_what_was_planned_and_little_that_proved_unnecessary(evaluated: EvaluateConfig, tmp_path: Path, changes):
    config = evaluated.model_copy(update={"out": tmp_path, "sites": (SITE,), **changes})
    tally = Tally()
    evaluate.run(config, tally)
    planned = planned_blocks(config, [1, 1] if "saes_at_once" in changes else [2])
    assert tally.counted == planned
    assert tally.resumed < planned / 2
    again = Tally()
    evaluate.run(config, again)
    assert again.counted == 0  # everything is skipped: a bar of several evaluations finishes this share itself


def test_uniformity_costs_one_backward_pass_a_batch_and_no_forward(evaluated: EvaluateConfig, tmp_path: Path, monkeypatch):
    calls = Counter()
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **named: calls.update(["grad"]) or grad(*given, **named))
    config = evaluated.model_copy(update={"out": tmp_path, "sites": (SITE, Site("resid_post", 0))})
    evaluate.run(config)
    assert calls["grad"] == json.loads((tmp_path / "cost.json").read_text())["backwards"] == 2
    without = config.model_copy(update={"out": tmp_path / "none", "uniformity_sequences": 0, "baseline_sequences": 0})
    evaluate.run(without)
    assert calls["grad"] == 2
    scores = metrics(without, SITE)
    assert scores["uniformity"] is None
    assert scores["baselines"]["pca"]["delta_loss"] is None
    assert scores["fvu"] == pytest.approx(metrics(config, SITE)["fvu"], rel=1e-6)


def test_saes_made_elsewhere_are_scored_without_shards(evaluated: EvaluateConfig, tmp_path: Path):
    """The files of a release, of the very same SAEs: all but what training rows decide is the same."""
    for number in range(2):
        sae, _ = read_sae(evaluated.trained / SITE.folder / f"w32_{number}")
        folder = tmp_path / "gemma-scope-tiny-mlp" / "layer_1" / "width_32" / f"average_l0_{number}"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.tensors().items()})
    changes = {"trained": tmp_path / "gemma-scope-tiny-mlp", "out": tmp_path / "scores", "shards": None}
    config = evaluated.model_copy(update=changes)
    assert evaluate.run(config).num_evaluated == 2
    got, want = metrics(config, SITE, "width_32/average_l0_0"), metrics(evaluated, SITE, "w32_0")
    for name in ("l0", "fvu", "delta_loss", "kl", "cosine", "by_position", "firing", "uniformity", "loss_zero_ablated"):
        assert close(got[name], want[name]), name
    assert got["fvu_pca"] == pytest.approx(want["fvu_pca"], rel=0.05)
    assert json.loads((config.out / "cost.json").read_text())["forwards"]["calibration"] > 0


def test_topk_saes_of_another_project_are_scored_by_the_same_rules(evaluated: EvaluateConfig, tmp_path: Path):
    """Every usual row has k latents, for W_enc is wide enough that so many are positive."""
    sae, _ = read_sae(evaluated.trained / "resid_post/layer_1/w32_0")
    top = Sae(**sae.own_tensors() | {"threshold": torch.zeros(32)}, metadata=SaeMetadata(Site("resid_post", 1)), top_k=3)
    qwen_scope.write(tmp_path / "qwen", top, num_layers=2)
    config = evaluated.model_copy(update={"trained": tmp_path / "qwen", "out": tmp_path / "scores", "shards": None})
    evaluate.run(config)
    scores = json.loads((tmp_path / "scores/resid_post/layer_1/sae/metrics.json").read_text())
    latents = pyarrow.parquet.read_table(tmp_path / "scores/resid_post/layer_1/sae/latents.parquet")
    assert scores["l0"] == pytest.approx(3, abs=0.05)
    assert np.asarray(latents["frequency"]).sum() == pytest.approx(scores["l0"])
    assert 0 < scores["fvu_usual"] < 2


def test_transcoders_are_scored_alike_whichever_input_their_file_takes(tmp_path: Path):
    """Gemma Scope 1's take the MLP's input without the norm's gain, Gemma Scope 2's with it; converted, one is the other."""
    config = build_scope(tmp_path, (Site("mlp_out", 1),))
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    model.model.layers[1].pre_feedforward_layernorm.weight.data.uniform_(-0.5, 1)  # tiny_gemma's gains are all 1
    model.save_pretrained(config.model.name)
    place = Site("mlp_in", 1)
    with_gain = Sae(
        **random_sae(16, 32, 0.5, torch.zeros(16), seed=3).own_tensors(),
        W_skip=torch.randn(16, 16, generator=torch.Generator().manual_seed(3)) / 8,
        metadata=SaeMetadata(place, "google/gemma-3-270m", target=Site("mlp_out", 1), convention="mlp_input"),
    )
    norm = mlp_norm_of(load_language_model(config.model).adapter, 1)
    gemma_scope_2.write(tmp_path / "released/layer_1_width_32_l0_big_affine", with_gain)
    without = to_convention(with_gain, "normalised", norm.gain)
    gemma_scope.write(tmp_path / "released/gemma-scope-2b-pt-transcoders/layer_1/width_32/average_l0_9", without)
    config = config.model_copy(update={"trained": tmp_path / "released", "out": tmp_path / "scored", "shards": None})
    assert evaluate.run(config).num_evaluated == 2
    one, other = (json.loads(path.read_text()) for path in sorted((tmp_path / "scored").rglob("metrics.json")))
    assert 0 < one["l0"] < 32
    for name in ("l0", "fvu", "delta_loss", "kl", "cosine"):
        assert other[name] == pytest.approx(one[name], rel=1e-4), name
    residual = without.with_tensors(replace(without.metadata, site=Site("resid_mid", 1), convention="residual"))
    residual.save(tmp_path / "residual/layer_1")
    own = residual.own_tensors()
    sae = Sae(own["W_enc"], own["W_enc"].T.contiguous(), own["b_enc"], torch.zeros(16), own["threshold"])
    sae.metadata = SaeMetadata(Site("resid_mid", 1))  # another coder of that stream by the same encoder
    sae.save(tmp_path / "residual/sae/layer_1")
    assert (
        evaluate.run(config.model_copy(update={"trained": tmp_path / "residual", "out": tmp_path / "of_resid"})).num_evaluated
        == 2
    )
    found = {
        next(part for part in path.parts if part.startswith("resid_")): pyarrow.parquet.read_table(path)["frequency"].to_pylist()
        for path in (tmp_path / "of_resid").rglob("latents.parquet")
    }
    assert sum(found["resid_mid"]) > 0
    assert found["resid_transcoder"] == pytest.approx(found["resid_mid"])


def test_saes_of_the_embedding_matrix_meet_the_embeddings_that_they_were_trained_on(tmp_path: Path):
    """A Gemma multiplies its embedding by sqrt(d): an exact SAE of the matrix's rows stays exact, with as many latents."""
    config = build_scope(tmp_path / "scope", (Site("embed", 0),))
    matrix = load_language_model(config.model).model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    exact, folder = identity_sae(16), tmp_path / "gemma-scope-tiny-res" / "embedding" / "width_32" / "average_l0_16"
    shift = torch.linspace(-0.1, 0.1, 16)
    sae = Sae(exact.W_enc, exact.W_dec, exact.b_enc - shift @ exact.W_enc, shift, exact.threshold)
    assert torch.allclose(sae(matrix), matrix, atol=1e-6)
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.tensors().items()})
    trained = tmp_path / "gemma-scope-tiny-res"
    config = config.model_copy(update={"trained": trained, "out": tmp_path / "scores", "shards": None})
    evaluate.run(config)
    scores = metrics(config, Site("embed", 0), "width_32/average_l0_16")
    assert scores["fvu"] < 1e-9
    assert scores["l0"] == pytest.approx(16)
    assert scores["delta_loss"] == pytest.approx(0, abs=1e-5)


def test_a_suites_folders_are_scored_with_the_shards_of_its_run(evaluated: EvaluateConfig, tmp_path: Path):
    folder = tmp_path / "suite" / SITE.folder / "width_32" / "average_l0_5"
    folder.mkdir(parents=True)
    sae, _ = read_sae(evaluated.trained / SITE.folder / "w32_1")
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.tensors().items()})
    config = evaluated.model_copy(update={"trained": tmp_path / "suite", "out": tmp_path / "scores"})
    evaluate.run(config)
    assert metrics(config, SITE, "width_32/average_l0_5")["fvu"] == metrics(evaluated, SITE, "w32_1")["fvu"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shorter_formats_change_little_and_say_so(evaluated: EvaluateConfig, tmp_path: Path, dtype: str):
    config = copied(evaluated, tmp_path, sae_dtype=dtype)
    evaluate.run(config)
    got, want = metrics(config, SITE), metrics(evaluated, SITE)
    assert got["precision"] == {"sae": dtype, "model": "float32"}
    assert got["fvu"] != want["fvu"]
    assert got["fvu"] == pytest.approx(want["fvu"], rel=0.02)


def test_turns_are_measured_apart(evaluated: EvaluateConfig, tmp_path: Path):
    for number in range(30):
        words = f"path value {number} " * 4
        chat = f"<start_of_turn>user\n{words}<end_of_turn>\n<start_of_turn>model\nreturn {words}<end_of_turn>\n"
        (tmp_path / f"{number}.txt").write_text(chat)
    text = evaluated.text.model_copy(update={"paths": (tmp_path,), "context": 40})
    config = evaluated.model_copy(update={"text": text, "out": tmp_path / "scores", "sites": (SITE,)})
    evaluate.run(config)
    scores = metrics(config, SITE)
    user, model = scores["by_segment"]["user"], scores["by_segment"]["model"]
    assert user["num_tokens"] + model["num_tokens"] == scores["num_tokens"]
    whole = (user["l0"] * user["num_tokens"] + model["l0"] * model["num_tokens"]) / scores["num_tokens"]
    assert whole == pytest.approx(scores["l0"])
    for side in (user, model):
        for name, (low, high) in side["intervals"].items():
            assert low <= side[name] <= high, name


def test_what_does_not_fit_is_refused(evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = copied(evaluated, tmp_path)
    with pytest.raises(DataError, match="everyscope train"):
        evaluate.run(config.model_copy(update={"trained": tmp_path / "nothing"}))
    write_sae(config.trained / SITE.folder / "wrong", identity_sae(5), {})
    with pytest.raises(ShapeMismatch, match=r"d_in=5, mlp_out layer 1 of .* gives 16; is it an SAE of another model or site"):
        evaluate.run(config)
    shutil.rmtree(config.trained / SITE.folder / "wrong")
    one = tmp_path / "one.txt"
    one.write_text("one document, which is not held out")
    text = config.text.model_copy(update={"paths": (one,), "held_out_fraction": 1e-9})
    with pytest.raises(TextError, match="none of its 1 documents is held_out"):
        evaluate.run(config.model_copy(update={"text": text}))
    broken = random_sae(16, 32, 0.1, torch.zeros(16), seed=0)
    huge = Sae(broken.W_enc, broken.W_dec * 3e38, broken.b_enc, broken.b_dec, broken.threshold)
    write_sae(config.trained / SITE.folder / "huge", huge, {})
    with pytest.raises(NonFinite, match="NaN or infinity"):
        evaluate.run(config)
    monkeypatch.setattr(language_models, "check_residual_identity", lambda *_, **__: refuse())
    with pytest.raises(ModelError, match="its output is not its input plus"):
        evaluate.run(config)


def refuse() -> None:
    raise ModelError("Odd, layer 0: its output is not its input plus what its attention and MLP add")


def test_logits_that_are_not_numbers_are_refused(evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(config):
        language = load_language_model(config)
        language.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))  # pyright: ignore[reportAttributeAccessIssue]
        return language

    monkeypatch.setattr(evaluate, "load_language_model", broken)
    with pytest.raises(NonFinite, match="the language model: logits are NaN or infinite; run the model in float32"):
        evaluate.run(copied(evaluated, tmp_path))
    assert not list((tmp_path / "scores").rglob("metrics.json"))
