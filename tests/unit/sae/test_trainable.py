"""One update of an SAE in training, its initial state, and what folding keeps."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.functional import loss_gradients, unit_rows, without_parallel_part
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import (
    TENSORS,
    TrainableSae,
    adam_by_row,
    adam_without_momentum,
    catch_up,
    dense_update,
    fold,
    new_sae,
)

RECIPE = SaePreset(
    learning_rate=1e-2, learning_rate_warmup_steps=0, sparsity_warmup_steps=0, bandwidth=0.2, initial_threshold=0.1
)
BY_ROW = RECIPE.model_copy(update={"direction_rate": 0.1, "encoder_follows": True, "warm_start": True, "encoder_scale": 0.5})


def trained(width=48, d_in=16, steps=30, preset=RECIPE) -> tuple[TrainableSae, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, d_in, generator=generator)
    x /= x.square().sum(1).mean().sqrt()
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=1e-2, preset=preset), d_in)
    for step in range(steps):
        dense_update(sae, x, step, steps)
    return sae, x


def test_initial_state_is_the_papers():
    sae = new_sae(SaeConfig(width=64, sparsity_coefficient=1e-3), d_in=24)
    p = sae.parameters
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(64))
    assert torch.equal(p["W_enc"], p["W_dec"].T)
    assert p["W_enc"].T.is_contiguous()  # stored by latent, as the pair kernels read it
    assert p["b_enc"].eq(0).all()
    assert p["b_dec"].eq(0).all()
    assert p["threshold"].eq(torch.tensor(0.001)).all()


def test_seeds_decide_the_initial_state():
    first, again, other = (new_sae(SaeConfig(width=8, sparsity_coefficient=0, seed=seed), 4) for seed in (0, 0, 1))
    assert torch.equal(first.parameters["W_dec"], again.parameters["W_dec"])
    assert not torch.equal(first.parameters["W_dec"], other.parameters["W_dec"])


def test_adam_equals_torchs_own_with_beta1_zero():
    generator = torch.Generator().manual_seed(2)
    ours = torch.randn(40, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    optimiser = torch.optim.Adam([theirs], lr=1e-2, betas=(0.0, 0.999), eps=1e-8)
    squared = torch.zeros_like(ours)
    for step in range(50):
        gradient = torch.randn(40, generator=generator, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimiser.step()
        adam_without_momentum(ours, gradient, squared, 1e-2, RECIPE, step)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_a_step_by_row_keeps_the_gradients_direction_and_has_the_rates_size():
    generator = torch.Generator().manual_seed(2)
    rows, squared = torch.zeros(20, 12, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    gradients = torch.randn(50, 20, 12, generator=generator, dtype=torch.float64) * torch.logspace(-6, 6, 20)[:, None]
    for step, gradient in enumerate(gradients):
        before = rows.clone()
        adam_by_row(rows, gradient, squared, 0.1, RECIPE, step)
        weights = 0.999 ** torch.arange(step, -1, -1, dtype=torch.float64)
        mean = (weights[:, None] * gradients[: step + 1].square().sum(2)).sum(0) / weights.sum()
        torch.testing.assert_close(rows - before, -0.1 * gradient / (mean.sqrt() + 1e-8)[:, None])


@pytest.mark.parametrize("adam", [adam_without_momentum, adam_by_row])
def test_a_bounded_step_is_as_long_as_the_bound_however_sudden_the_gradient(adam):
    """After a thousand gradients of one size, one a thousand times as large moves by sqrt(1000) rates, or by the bound."""
    moves = {}
    for largest in (None, 3.0):
        row, gradient = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        squared = torch.zeros_like(row) if adam is adam_without_momentum else torch.zeros(1, dtype=torch.float64)
        for step in range(1000):
            adam(row, gradient, squared, 1e-3, RECIPE, step, largest)
        before = row.clone()
        adam(row, 1000 * gradient, squared, 1e-3, RECIPE, 1000, largest)
        moves[largest] = (row - before).norm() / (2 if adam is adam_without_momentum else 1) / 1e-3
        torch.testing.assert_close(before, -gradient / (2 if adam is adam_by_row else 1), rtol=1e-6, atol=0)  # as without it
    assert moves[None] == pytest.approx(25, abs=1)
    assert moves[3.0] == pytest.approx(3, rel=1e-6)


def test_an_encoder_follows_its_direction():
    """What W_enc moves by beyond its own Adam step is encoder_scale times the direction's move, weighed by coordinate."""
    sae, x = trained(preset=BY_ROW, steps=3)
    sae.coordinate_weights.copy_(torch.linspace(0.5, 1.5, 16))
    alone = copy.deepcopy(sae)
    alone = replace(
        alone, config=alone.config.model_copy(update={"preset": BY_ROW.model_copy(update={"encoder_follows": False})})
    )
    before = sae.parameters["W_dec"].clone()
    for each in (sae, alone):
        dense_update(each, x, 3, 30)
    moved = sae.parameters["W_dec"] - before
    assert moved.norm(dim=1).median() > 0.03
    assert torch.equal(sae.parameters["W_dec"], alone.parameters["W_dec"])
    want = alone.parameters["W_enc"] + 0.5 * (moved * torch.linspace(0.5, 1.5, 16)).T
    torch.testing.assert_close(sae.parameters["W_enc"], want, rtol=1e-6, atol=1e-7)


def test_following_needs_what_it_follows():
    for missing in ({"direction_rate": None}, {"warm_start": False}):
        with pytest.raises(ValidationError, match="encoder_follows"):
            SaePreset(**{"encoder_follows": True, "direction_rate": 0.1, "warm_start": True} | missing)


def test_projection_leaves_nothing_along_the_latents_own_direction():
    generator = torch.Generator().manual_seed(3)
    W_dec = unit_rows(torch.randn(20, 12, generator=generator))
    projected = without_parallel_part(torch.randn(20, 12, generator=generator), W_dec)
    assert (projected * W_dec).sum(1).abs().max() < 1e-6


def test_update_order_is_project_then_adam_then_unit_norm():
    sae, x = trained(steps=5)
    before = copy.deepcopy(sae)
    dense_update(sae, x, 5, 30)
    p = before.parameters
    gradient = loss_gradients(x, **p, penalty=lambda rates: torch.full_like(rates, 1e-2), bandwidth=0.2).W_dec
    W_dec, squared = p["W_dec"].clone(), before.squared["W_dec"].clone()
    adam_without_momentum(W_dec, without_parallel_part(gradient, W_dec), squared, 1e-2, RECIPE, 5)
    torch.testing.assert_close(sae.parameters["W_dec"], unit_rows(W_dec))
    torch.testing.assert_close(sae.parameters["W_dec"].norm(dim=1), torch.ones(48))


def test_training_lowers_the_loss_and_more_sparsity_means_less_l0():
    losses = []
    for coefficient in (1e-3, 3e-2):
        sae = new_sae(SaeConfig(width=48, sparsity_coefficient=coefficient, preset=RECIPE), 16)
        _, x = trained(steps=0)
        history = [dense_update(sae, x, step, 200) for step in range(200)]
        losses.append((history[-1].l0.item(), history[-1].reconstruction.item()))
        assert history[-1].reconstruction < history[0].reconstruction
    (l0_dense, loss_dense), (l0_sparse, loss_sparse) = losses
    assert l0_sparse < l0_dense
    assert loss_sparse > loss_dense


@pytest.mark.parametrize("preset", [RECIPE, BY_ROW])
def test_latents_left_alone_catch_up_to_the_means_that_decay_gives(preset):
    sae, _ = trained(steps=5, preset=preset)
    before = copy.deepcopy(sae)
    sae.touched[::2] = 2
    catch_up(sae, 5)
    assert sae.touched.eq(5).all()
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0), ("threshold", 0)):
        got, was = (side.squared[name].movedim(axis, 0) for side in (sae, before))
        torch.testing.assert_close(got[::2], was[::2] * 0.999**3)
        assert torch.equal(got[1::2], was[1::2])


def test_thresholds_never_fall_below_zero():
    preset = RECIPE.model_copy(update={"threshold_learning_rate": 1.0})
    sae, _ = trained(preset=preset, steps=10)
    assert sae.parameters["threshold"].min() >= 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 750.0])
def test_folded_equals_unfolded_to_float32_rounding(scale):
    sae, x = trained()
    folded = fold(sae, Normalisation(scale))
    torch.testing.assert_close(folded(x * scale), sae(x) * scale, rtol=2e-5, atol=2e-5 * scale)
    agree = (folded.encode(x * scale) > 0) == (sae.encode(x) > 0)
    assert agree.float().mean() > 0.9999
    assert set(folded.tensors()) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    assert set(TENSORS) == set(sae.parameters)
