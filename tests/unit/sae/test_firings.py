"""Firings without dense codes are those of the dense ones, bit for bit."""

import numpy as np
import pytest
import torch

from everyscope.base.errors import NonFinite
from everyscope.sae.firings import firings_by_latent
from everyscope.sae.folded import Sae


def random_sae(top_k: int | None = None) -> Sae:
    """Of 37 latents, with thresholds below, at and above 0, one that never fires and one that always does."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*size, generator=generator) for size in ((9, 37), (37, 9), (37,), (9,), (37,))]
    tensors[4][0], tensors[2][1], tensors[4][1], tensors[4][2] = 1e6, 1e3, 0.5, 0.0
    return Sae(*tensors, top_k=top_k)


@pytest.mark.parametrize("make", [random_sae, lambda: random_sae().bfloat16(), lambda: random_sae(top_k=3)])
def test_firings_are_those_of_the_dense_codes(make):
    sae, x = make(), torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    found, f = firings_by_latent(sae, x), sae.encode(x).float().numpy()
    dense = np.zeros_like(f)
    dense[found.rows, np.repeat(np.arange(sae.d_sae), np.diff(found.starts))] = found.values
    assert np.array_equal(dense, f)
    assert len(found.values) == found.starts[-1] == (f > 0).sum()
    for latent in range(sae.d_sae):
        assert (np.diff(found.rows[found.starts[latent] : found.starts[latent + 1]]) > 0).all()


def test_no_rows_have_no_firings():
    assert firings_by_latent(random_sae(), torch.zeros(0, 9)).starts.tolist() == [0] * 38


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float):
    x = torch.zeros(4, 9)
    x[2, 3] = bad
    with pytest.raises(NonFinite, match="latents of 4 rows"):
        firings_by_latent(random_sae(), x)
