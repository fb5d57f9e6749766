"""Thresholds set from a batch and held at an L0."""

import pytest
import torch
from pydantic import ValidationError

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.thresholds import coordinate_weights, drive_thresholds, warm_start
from everyscope.sae.trainable import dense_update, new_sae

RECIPE = SaePreset(
    learning_rate=1e-3, learning_rate_warmup_steps=0, sparsity_warmup_steps=0, bandwidth=0.05, warm_start=True, driven_share=0.5
)


def rows(count, seed=0) -> torch.Tensor:
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x / x.square().sum(1).mean().sqrt()


def test_a_warm_start_meets_the_target_on_its_batch_and_centres_it():
    sae = new_sae(SaeConfig(width=200, target_l0=9, target_weight=0, preset=RECIPE), 24)
    x = rows(500)
    warm_start(sae, x)
    torch.testing.assert_close(sae.parameters["b_dec"], x.mean(0))
    assert (sae.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(9, abs=0.01)


def test_coordinates_are_weighed_by_the_inverse_root_of_their_variance():
    x = rows(2000) * torch.logspace(-3, 1, 24)
    weights, variance = coordinate_weights(x), x.double().var(0, correction=0)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    product = weights.double().square() * (variance + 0.3 * variance.mean())
    torch.testing.assert_close(product, product[:1].expand(24), rtol=1e-4, atol=0)
    torch.testing.assert_close(coordinate_weights(x + 100 * torch.randn(24)), weights, rtol=1e-2, atol=0)  # the mean is no matter
    assert torch.equal(coordinate_weights(torch.ones(5, 24)), torch.ones(24))  # nothing varies


def test_a_warm_start_weighs_encoders_that_follow():
    preset = RECIPE.model_copy(update={"encoder_follows": True, "direction_rate": 0.1, "encoder_scale": 0.5})
    sae = new_sae(SaeConfig(width=200, target_l0=9, preset=preset), 24)
    x = rows(500) * torch.linspace(0.1, 3, 24)
    warm_start(sae, x)
    want = 0.5 * (sae.parameters["W_dec"] * coordinate_weights(x)).T
    torch.testing.assert_close(sae.parameters["W_enc"], want)
    assert sae.parameters["W_enc"].T.is_contiguous()
    assert (sae.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(9, abs=0.01)


def test_driven_thresholds_come_to_the_target_and_stay():
    sae = new_sae(SaeConfig(width=200, target_l0=9, target_weight=0, preset=RECIPE), 24)
    warm_start(sae, rows(500))
    sae.parameters["threshold"].mul_(0.5)
    history = []
    for step in range(60):
        losses = dense_update(sae, rows(500, step), step, 1000)
        history.append(losses.l0.item())
        assert len(sae.parameters["threshold"].unique()) == 1  # nothing else moves them in this phase
        drive_thresholds(sae, losses, step + 1)
    assert history[0] > 30
    assert max(abs(l0 - 9) for l0 in history[20:]) < 1.5


def test_driving_needs_a_target():
    with pytest.raises(ValidationError, match="needs target_l0"):
        SaeConfig(width=4, sparsity_coefficient=0, preset=RECIPE)


def test_silent_latents_come_down_until_they_fire():
    preset = RECIPE.model_copy(update={"revive_steps": 3})
    sae = new_sae(SaeConfig(width=200, target_l0=9, target_weight=0, preset=preset), 24)
    warm_start(sae, rows(500))
    sae.parameters["threshold"][7] = 5.0
    losses = dense_update(sae, rows(500), 0, 1000)
    sae.last_fired.masked_fill_(losses.fired > 0, 1)
    before = sae.parameters["threshold"].clone()
    drive_thresholds(sae, losses, 2)
    moved = sae.parameters["threshold"] - before
    torch.testing.assert_close(moved, moved[:1].expand(200))  # two steps of silence are no reason yet
    drive_thresholds(sae, losses, 4)
    silent = 4 - sae.last_fired >= 3
    assert silent[7]
    ratio = sae.parameters["threshold"] / (before + 2 * moved)
    torch.testing.assert_close(ratio, torch.where(silent, 0.97, 1.0), rtol=1e-3, atol=0)


def test_reviving_needs_a_phase_to_act_in():
    with pytest.raises(ValidationError, match="driven_share"):
        SaePreset(revive_steps=5)
