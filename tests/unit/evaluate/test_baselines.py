"""Baselines against direct computation."""

import pytest
import torch

from everyscope.evaluate.baselines import Baseline, RandomDirections, baselines_of, edit_of, edits_of
from everyscope.evaluate.calibration import Calibration, CalibrationSums

D_IN = 10


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    torch.manual_seed(0)
    sums = CalibrationSums()
    sums.update(torch.randn(1500, D_IN) @ torch.randn(D_IN, D_IN) + 7)
    return sums.finish()


@pytest.mark.parametrize("size", [0, 1, 4, 10, 12])
def test_pca_keeps_the_first_components(calibration: Calibration, size: int):
    x = calibration.rows[:50]
    x_hat, used = edit_of(Baseline("pca", size), calibration)(x)
    _, _, right = torch.linalg.svd(calibration.rows.double() - calibration.mean)
    kept, centred = right[:size], x.double() - calibration.mean
    assert torch.allclose(x_hat, calibration.mean + centred @ kept.T @ kept, atol=1e-9)
    assert (used == min(size, D_IN)).all()


@pytest.mark.parametrize("size", [0, 1, 4, 10, 12])
def test_the_neuron_basis_keeps_the_largest_coordinates(calibration: Calibration, size: int):
    x = calibration.rows[:50]
    x_hat, used = edit_of(Baseline("neuron_basis", size), calibration)(x)
    centred = x.double() - calibration.mean
    left_out = centred.abs().sort(dim=1).values[:, : max(0, D_IN - size)]
    assert torch.allclose((x.double() - x_hat).square().sum(1), left_out.square().sum(1))
    assert (used == min(size, D_IN)).all()


@pytest.mark.parametrize(("width", "l0"), [(64, 3), (64, 20), (7, 2)])
def test_a_random_dictionary_has_the_l0_and_the_gain_that_it_is_asked_for(calibration: Calibration, width: int, l0: int):
    sae = RandomDirections(width, calibration, seed=5).dictionary(l0)
    f = sae.encode(calibration.rows)
    assert float((f > 0).sum(1).float().mean()) == pytest.approx(l0, rel=0.02)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(width))
    centred, x_hat = (calibration.rows - sae.b_dec).double(), (sae(calibration.rows) - sae.b_dec).double()
    assert float((centred * x_hat).sum() / x_hat.square().sum()) == pytest.approx(1, rel=1e-4)
    assert torch.equal(RandomDirections(width, calibration, seed=5).dictionary(l0).W_enc, sae.W_enc)
    assert not torch.equal(RandomDirections(width, calibration, seed=6).dictionary(l0).W_dec, sae.W_dec)


def test_no_latents_is_the_mean(calibration: Calibration):
    for edit in edits_of(baselines_of(0.2, 16), calibration, 0).values():
        x_hat, used = edit(calibration.rows)
        assert torch.allclose(x_hat.double(), calibration.mean.expand_as(x_hat), atol=1e-5)
        assert not used.any()


def test_chunks_change_nothing(calibration: Calibration, monkeypatch: pytest.MonkeyPatch):
    sizes = [Baseline("random_dictionary", size, 64) for size in (4, 9)]
    found = edits_of(sizes, calibration, 0)
    monkeypatch.setattr("everyscope.evaluate.baselines.CHUNK_ACTIVATIONS", 64 * 13)
    for size in sizes:  # each by itself, which shares nothing with the other
        whole, parts = (edits[size](calibration.rows) for edits in (found, edits_of([size], calibration, 0)))
        assert torch.allclose(whole[0], parts[0], atol=1e-5)
        assert torch.equal(whole[1], parts[1])
