"""The named recipes do what they are named for, on activations that are sparse in truth."""

import pytest
import torch

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.presets import fast, gemma_scope, gemma_scope_2
from everyscope.train.arrays import train_saes

D_IN, DIRECTIONS, L0 = 24, 60, 4


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """Sums of a few of sixty directions, some far more frequent than others, with a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D_IN, generator=generator))
    rates = torch.linspace(1.6, 0.4, DIRECTIONS) * L0 / DIRECTIONS
    rates[0] = 0.5
    fires = torch.rand(20_000, DIRECTIONS, generator=generator) < rates
    sizes = 0.5 + torch.rand(20_000, DIRECTIONS, generator=generator)
    return (fires * sizes) @ directions * 7 + 3


def train(activations, preset, **fields):
    config = SaeConfig(width=96, preset=preset, **fields)
    sae = train_saes(activations, [config], num_tokens=128_000, batch_rows=128)[0]
    f = sae.encode(activations)
    fvu = (sae.decode(f) - activations).square().sum() / (activations - activations.mean(0)).square().sum()
    return f, fvu.item()


def test_fast_meets_its_target_and_leaves_few_latents_dead(activations):
    f, fvu = train(activations, fast(D_IN), target_l0=5)
    assert (f > 0).sum(1).double().mean().item() == pytest.approx(5, rel=0.15)
    assert fvu < 0.2  # five principal components leave 0.55
    assert (f > 0).any(0).double().mean() > 0.6  # there are only sixty directions for 96 latents


def test_a_frequency_limit_keeps_latents_below_it(activations):
    # The limit is part of the loss that thresholds learn from, so they are given half of the run to learn in.
    recipes = [fast(D_IN).model_copy(update={"frequency_limit": limit, "driven_share": 0.5}) for limit in (None, 0.1)]
    without, with_limit = (train(activations, preset, target_l0=5)[0] for preset in recipes)
    assert (without > 0).double().mean(0).max() > 0.25  # the first direction is there on half of the rows
    assert (with_limit > 0).double().mean(0).max() < 0.13


def test_prefixes_reconstruct_by_themselves(activations):
    plain = fast(D_IN).model_copy(update={"is_centred": False})
    nested = plain.model_copy(update={"prefix_shares": (0.25, 1.0)})
    shares = []
    for preset in (plain, nested):
        config = SaeConfig(width=96, target_l0=5, preset=preset)
        sae = train_saes(activations, [config], num_tokens=128_000, batch_rows=128)[0]
        f = sae.encode(activations)
        f[:, 24:] = 0
        total = (activations - activations.mean(0)).square().sum()
        shares.append(((sae.decode(f) - activations).square().sum() / total).item())
    assert shares[1] < 0.7 * shares[0]


def test_the_papers_recipe_is_the_default():
    assert gemma_scope() == SaePreset()
    assert gemma_scope_2().prefix_shares[-1] == 1.0
