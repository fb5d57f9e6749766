"""Training on arrays: what is refused before the first step, what comes back, and who hears of it."""

import numpy as np
import pytest
import torch

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.sae.config import SaeConfig
from everyscope.sae.presets import fast, gemma_scope, gemma_scope_2, preset_of
from everyscope.sites.names import BySite, Site
from everyscope.train.arrays import TrainedSaes, num_steps, train_saes

ROWS = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32) * 3 + 1
CONFIG = SaeConfig(width=16, target_l0=3)


def trained(rows=ROWS, configs=CONFIG, **changes) -> TrainedSaes:
    return train_saes(rows, configs, **{"num_tokens": 1200, "batch_rows": 100} | changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_tokens": 99}, "num_tokens=99 is 99 rows, less than one batch of batch_rows=100"),
        ({"num_tokens": 0}, "num_tokens=0: expected a number above 0"),
        ({"num_tokens": -1200}, "num_tokens=-1200: expected a number above 0"),
        ({"num_tokens": 1200.5}, "num_tokens=1200.5: expected a number above 0"),
        ({"num_tokens": float("nan")}, "num_tokens=nan"),
        ({"num_tokens": float("inf")}, "num_tokens=inf"),
        ({"num_tokens": None}, "neither is given"),
        ({"num_passes": 1}, "both are given"),
        ({"num_tokens": None, "num_passes": 0}, "num_passes=0: expected"),
        ({"num_tokens": None, "num_passes": 0.1}, "num_passes=0.1 is 60 rows, less than one batch"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"batch_rows": 601}, "activations have 600 rows, fewer than one batch of batch_rows=601"),
        ({"rows": BySite({Site("resid_post", 0): ROWS})}, "of 1 sites; SAEs train on one"),
        ({"rows": "shards/resid_post"}, "LocalSource"),
        ({"configs": []}, "expected SaeConfig"),
        ({"configs": [4096]}, "expected SaeConfig"),
        ({"configs": 4096}, "expected SaeConfig"),
        ({"preset": "quick"}, "preset='quick': expected one of fast, fast_transcoder, gemma_scope, gemma_scope_2"),
        ({"preset": "fast", "configs": SaeConfig(width=16, target_l0=3, preset=fast(8))}, "preset of their own"),
        ({"report_to": ["mlflow"]}, "report_to='mlflow': expected wandb or tensorboard"),
        ({"site": "resid_pots.3"}, "did you mean"),
    ],
)
def test_what_cannot_train_is_refused(changes, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        trained(**changes)
    assert "\n" not in str(caught.value)


def test_steps_are_whole_batches_of_tokens_or_passes():
    assert num_steps(600, 1e6, None, 512) == num_steps(600, 10**6, None, 512) == 1953
    assert num_steps(600, None, 2.5, 100) == 15
    assert num_steps(600, None, 1, 600) == 1


def test_rows_as_a_list_are_those_of_the_array():
    want = trained()[0]
    for rows in (ROWS.tolist(), list(ROWS), list(torch.from_numpy(ROWS)), torch.from_numpy(ROWS)):
        assert torch.equal(trained(rows)[0].W_enc, want.W_enc)
    for ragged in ([[1.0, 2.0], [3.0]], [object()]):
        with pytest.raises(ShapeMismatch, match="rows of equal length"):
            trained(ragged)


def test_each_step_is_heard_of_and_kept():
    heard = []

    def listen(step, losses):
        heard.append((step, [(loss.reconstruction.item(), loss.l0.item()) for loss in losses]))

    configs = [CONFIG, SaeConfig(width=24, sparsity_coefficient=1e-3)]
    saes = trained(configs=configs, callback=listen)
    assert [step for step, _ in heard] == list(range(1, 13)) == saes.losses[0].step.tolist()
    for number, history in enumerate(saes.losses):
        assert history.reconstruction.tolist() == [losses[number][0] for _, losses in heard]
        assert history.l0.tolist() == [losses[number][1] for _, losses in heard]
    assert [sae.d_sae for sae in saes] == [16, 24]
    assert saes[-1] is list(saes)[1] is saes[0:][1]
    assert "\n" not in repr(saes)
    assert torch.equal(trained(configs=configs)[1].W_enc, saes[1].W_enc), "listening changes nothing"


def test_what_is_trained_knows_what_it_is_of():
    saes = trained(site="blocks.3.hook_resid_post", model="gpt2")
    known = saes[0].metadata
    assert (known.site, known.model, known.num_tokens) == (Site("resid_post", 3), "gpt2", 1200)
    assert known.scale == pytest.approx(np.sqrt((ROWS.astype(np.float64) ** 2).sum(1).mean()))
    assert known.l0 == pytest.approx(float(saes.losses[0].l0[-1]))  # a tenth of twelve steps is one
    assert trained()[0].metadata.site is None


@pytest.mark.parametrize("name", ["fast", "gemma_scope", "gemma_scope_2"])
def test_a_preset_is_the_recipe_of_its_name(name):
    preset = {"fast": fast(8), "gemma_scope": gemma_scope(), "gemma_scope_2": gemma_scope_2()}[name]
    assert preset_of(name, 8) == preset
    own = SaeConfig(width=16, target_l0=3, seed=5, preset=preset)
    by_name = trained(configs=SaeConfig(width=16, target_l0=3, seed=5), preset=name)
    assert torch.equal(by_name[0].W_enc, trained(configs=own)[0].W_enc)


def test_the_engine_is_the_callers():
    with pytest.raises(ConfigError, match="engine=auto or dense"):
        trained(engine="pairs", device="meta")
    dense, pairs = trained(engine="dense"), trained(engine="pairs")
    torch.testing.assert_close(dense[0].W_enc, pairs[0].W_enc, rtol=1e-3, atol=1e-4)
