"""FVU, L0 and the rest against closed forms and direct float64 computation."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from everyscope.base.errors import DataError, NonFinite, ShapeMismatch
from everyscope.sae.metrics import ReconstructionSums


def summed(x: Tensor, x_hat: Tensor, f: Tensor, batch: int, reference: Tensor | None = None) -> ReconstructionSums:
    sums = ReconstructionSums.start(torch.zeros(x.shape[1]) if reference is None else reference, f.shape[1])
    for start in range(0, len(x), batch):
        stop = start + batch
        sums.update(x[start:stop], x_hat[start:stop], f[start:stop])
    return sums


def sample(scale: float = 1.0, offset: float = 0.0, rows: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = scale * (torch.randn(rows, 12, generator=generator) + offset)
    x_hat = x + 0.3 * scale * torch.randn(rows, 12, generator=generator)
    f = torch.randn(rows, 20, generator=generator).clamp(min=0) * scale
    return x, x_hat, f


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("is_shifted", [True, False])
def test_fvu_and_l0_are_exact_at_any_batch_size_scale_and_mean(batch: int, scale: float, offset: float, is_shifted: bool):
    x, x_hat, f = sample(scale, offset)
    sums = summed(x, x_hat, f, batch, x[:100].mean(0) if is_shifted else None)
    exact = x.double()
    want = (exact - x_hat.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert sums.fvu == pytest.approx(float(want), rel=1e-6)
    assert sums.l0 == pytest.approx(float((f > 0).double().sum(1).mean()), rel=1e-12)
    assert sums.cosine == pytest.approx(float(torch.cosine_similarity(exact, x_hat.double()).mean()), rel=1e-6)
    assert sums.fvu_uncentred == pytest.approx(float((exact - x_hat.double()).square().sum() / exact.square().sum()), rel=1e-6)


def test_fvu_of_noise_is_its_share_of_the_variance():
    """x = plus or minus 2 about a mean of 50, errors of plus or minus 1: FVU is exactly a quarter."""
    signs = torch.tensor([1.0, -1.0]).repeat(500)[:, None]
    x = 50 + 2 * signs.expand(-1, 4)
    sums = summed(x, x + signs.roll(1, 0), torch.ones(1000, 3), 64)
    assert sums.fvu == pytest.approx(0.25, rel=1e-12)
    assert sums.l0 == 3


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_mean_predicts_fvu_1_and_the_identity_0(offset: float):
    x, _, f = sample(offset=offset)
    x = x.double()
    assert summed(x, x.mean(0).expand_as(x), f, 64).fvu == pytest.approx(1, abs=1e-9)
    assert summed(x, x, f, 64).fvu == 0
    assert summed(x, x, f, 64).cosine == pytest.approx(1)


def test_latents_fire_where_they_are_positive():
    f = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.5]])
    x = torch.randn(2, 4)
    sums = summed(x, x, f, 1)
    assert sums.frequencies.tolist() == [0, 1, 0.5]
    assert sums.mean_activations.tolist() == [0, 2, 0.5]
    assert sums.activation_maxima.tolist() == [0, 3, 0.5]
    assert sums.dead_fraction == pytest.approx(1 / 3)
    assert sums.dense_fraction == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_mse_and_l2_ratio_are_means_over_tokens(batch: int):
    x, x_hat, f = sample(offset=2.0)
    x[5] = 0
    sums = summed(x, x_hat, f, batch)
    exact, exact_hat = x.double(), x_hat.double()
    assert sums.mse == pytest.approx(float((exact - exact_hat).square().sum(1).mean()), rel=1e-12)
    kept = torch.arange(1000) != 5
    assert sums.l2_ratio == pytest.approx(float((exact_hat.norm(dim=1) / exact.norm(dim=1))[kept].mean()), rel=1e-12)
    assert summed(torch.zeros(3, 12), x_hat[:3], f[:3], 2).l2_ratio is None


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_fvu_is_what_saelens_leaves_unexplained_and_saebenchs_formula_is_not(scale: float, offset: float):
    """sae-lens 6.54 takes E||x||^2 - ||E x||^2 over the whole data set, as we do.

    SAEBench 0.6 squares activations before it averages them, over rows and dimensions, and squares that mean again: of two
    terms in squared units it subtracts one in their square, so that its explained variance changes with the units.
    """
    x, x_hat, f = sample(scale, offset)
    exact, error = x.double(), (x - x_hat).double().square().sum(1).mean()
    squares = exact.square().sum(1).mean()
    saelens = 1 - error / (squares - exact.mean(0).square().sum())
    ours = 1 - summed(x, x_hat, f, 64).fvu
    assert ours == pytest.approx(float(saelens), rel=1e-9)
    assert ours == pytest.approx(1 - 0.09, abs=0.01)
    saebench = float(1 - error / (squares - exact.square().mean() ** 2))
    assert abs(ours - saebench) > (0.005 if scale == 1 else 0)
    if scale == 4.0:
        assert saebench > 1


def test_measures_of_rows_add_up_to_the_sums():
    x, x_hat, f = sample(offset=1.0)
    sums = ReconstructionSums.start(torch.zeros(12), 20)
    rows = sums.update(x, x_hat, f)
    assert float(rows.errors.mean()) == pytest.approx(sums.mse, rel=1e-12)
    assert float(rows.cosines.mean()) == pytest.approx(sums.cosine, rel=1e-12)
    assert float(rows.firings.mean()) == pytest.approx(sums.l0, rel=1e-12)


def test_short_activations_are_widened_before_anything_is_summed():
    """Of bfloat16 rows, the numbers are those of the same rows in float64: nothing is squared or added in eight bits."""
    x, x_hat, f = sample(scale=30.0, offset=5.0)
    short = x.bfloat16()
    got, want = summed(short, x_hat, f, 64), summed(short.double(), x_hat.double(), f, 64)
    for name in ("fvu", "fvu_uncentred", "mse", "cosine", "l2_ratio", "reconstruction_bias"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-12)


def test_saved_sums_go_on_bit_by_bit():
    x, x_hat, f = sample(offset=5.0)
    whole = summed(x, x_hat, f, 100)
    first = summed(x[:500], x_hat[:500], f[:500], 100)
    second = ReconstructionSums.from_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    for start in range(500, 1000, 100):
        second.update(x[start : start + 100], x_hat[start : start + 100], f[start : start + 100])
    for name, tensor in whole.tensors().items():
        assert_close(second.tensors()[name], tensor, rtol=0, atol=0)


def test_what_cannot_be_summed_is_refused():
    x, x_hat, f = sample(rows=4)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFinite):
            summed(torch.full_like(x, bad), x_hat, f, 4)
        with pytest.raises(NonFinite):
            summed(x, x_hat, torch.full_like(f, bad), 4)
    with pytest.raises(ShapeMismatch):
        summed(x, x_hat[:, :3], f, 4)
    with pytest.raises(DataError, match="no unmasked token"):
        _ = summed(x[:0], x_hat[:0], f[:0], 4).fvu
    with pytest.raises(DataError, match="constant"):
        _ = summed(torch.ones(4, 12), x_hat, f, 4).fvu
    with pytest.raises(DataError, match="errors"):
        ReconstructionSums.from_tensors(
            {name: tensor for name, tensor in summed(x, x_hat, f, 4).tensors().items() if name != "errors"}
        )
