import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everyscope.sae import normalisation
from everyscope.sae.config import SaeConfig
from everyscope.sae.normalisation import Normalisation, is_massive
from everyscope.sae.trainable import fold, new_sae


def batch_of(massive: list[int]) -> torch.Tensor:
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 3
    rows[massive] *= 100
    return rows


@pytest.mark.parametrize("massive", [[], [0], [11], [3, 4, 5], [0, 1, 7], list(range(1, 12)), [0, 11]])
def test_usual_rows_take_the_place_of_massive_ones(massive):
    batch = batch_of(massive)
    kept = [row for row in range(12) if row not in massive]
    want = [row if row in kept else max((before for before in kept if before < row), default=kept[0]) for row in range(12)]
    assert_close(Normalisation(2.0, norm_limit=50)(batch), batch[want] / 2, rtol=0, atol=0)
    assert is_massive(batch, 50).nonzero().flatten().tolist() == massive


def test_a_batch_without_usual_rows_is_the_mean():
    normalise = Normalisation(2.0, np.ones(5), 1e-3)
    assert_close(normalise(batch_of([])), torch.full((12, 5), -0.5))


def test_devices_and_the_cpu_agree(monkeypatch):
    """What runs on a device is the same function of tensors."""
    normalise = Normalisation(1.7, np.linspace(-3, 3, 5), 50.0)
    batch = batch_of([2, 3])
    on_cpu = normalise(batch)
    replaced = normalisation._replaced(batch, is_massive(batch, 50.0))
    assert_close(on_cpu, (replaced - torch.linspace(-3, 3, 5)) / 1.7)
    assert_close(replace(normalise, largest_row=4.0)(batch), normalisation._shortened(on_cpu, 4.0))


def test_long_rows_keep_their_direction():
    batch = batch_of([4]) - 3
    batch[7] = 0
    x, shortened = Normalisation(2.0)(batch), Normalisation(2.0, largest_row=1.1)(batch)
    norms = x.norm(dim=1)
    assert (norms > 1.1).sum() in range(2, 11)
    assert_close(shortened.norm(dim=1), norms.clamp(max=1.1))
    assert_close(shortened * norms[:, None], x * shortened.norm(dim=1)[:, None])
    assert torch.equal(shortened[norms <= 1.1], x[norms <= 1.1])


def test_nothing_is_copied_where_nothing_is_massive():
    batch = batch_of([])
    assert_close(Normalisation(2.0)(batch), batch / 2, rtol=0, atol=0)
    assert_close(Normalisation(2.0, norm_limit=math.inf)(batch), Normalisation(2.0, norm_limit=1e9)(batch), rtol=0, atol=0)


def test_folding_a_mean_changes_nothing():
    """On raw rows the folded SAE gives what the SAE in training gives on normalised ones."""
    sae = new_sae(SaeConfig(width=40, sparsity_coefficient=0, seed=3), 5)
    generator = torch.Generator().manual_seed(1)
    for name, size in (("b_enc", 0.1), ("b_dec", 0.5), ("threshold", 0.05)):
        sae.parameters[name].copy_(torch.rand(sae.parameters[name].shape, generator=generator) * size)
    normalise = Normalisation(2.5, np.array([30.0, -4.0, 0.5, 0.0, 7.0]))
    raw = torch.randn(200, 5, generator=generator) * 2.5 + torch.from_numpy(normalise.mean).float()
    folded = fold(sae, normalise)
    want = sae(normalise(raw)) * 2.5 + torch.from_numpy(normalise.mean).float()
    assert_close(folded(raw), want, rtol=1e-5, atol=1e-5)
    assert_close(folded.encode(raw), sae.encode(normalise(raw)) * 2.5, rtol=1e-5, atol=2e-5)
    assert (folded.encode(raw) > 0).any()
