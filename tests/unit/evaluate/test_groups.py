"""Sums by group are those of the group alone, and a position-dependent error comes back exactly."""

import pytest
import torch
from torch import Tensor

from everyscope.evaluate.breakdowns import by_position, by_segment, firing, massive, part_fvu
from everyscope.evaluate.groups import Tables, moments, part, variance
from everyscope.evaluate.sums import SaeSums
from everyscope.evaluate.uniformity import UniformitySums
from everyscope.sae.metrics import ReconstructionSums

BLOCKS, CONTEXT, D_IN = 40, 7, 5
SIZES = {"document": 4, "position": CONTEXT, "segment": 2}


def groups() -> dict[str, Tensor]:
    block = torch.arange(BLOCKS).repeat_interleave(CONTEXT)
    position = torch.arange(CONTEXT).repeat(BLOCKS)
    return {"document": block // 10, "position": position, "segment": (position > 4).long()}


def summed(x: Tensor, x_hat: Tensor, f: Tensor, batch: int = 11) -> tuple[SaeSums, Tables]:
    device = torch.device("cpu")
    site = Tables.start(SIZES, 2 + D_IN, device)
    sae = SaeSums(
        ReconstructionSums.start(x[:9].mean(0), f.shape[1]),
        ReconstructionSums.start(x[:9].mean(0), f.shape[1]),
        Tables.start(SIZES, 3, device),
        Tables.start({"document": 4}, 3, device),
        Tables.start(SIZES, 2, device),
        Tables.start({"document": 4}, 1, device),
        UniformitySums.start(),
    )
    for start in range(0, len(x), batch):
        some = slice(start, min(start + batch, len(x)))
        site.add(part(groups(), some), moments(x[some], sae.reconstruction.reference))
        measures = sae.reconstruction.update(x[some], x_hat[some], f[some])
        columns = torch.stack([measures.errors, measures.cosines, measures.firings], dim=1)
        sae.rows.add(part(groups(), some), columns)
    return sae, site


def sample(scale: float = 1.0, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = scale * (torch.randn(BLOCKS * CONTEXT, D_IN, generator=generator, dtype=torch.float64) + offset)
    x_hat = x + 0.2 * scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, x_hat, torch.randn(len(x), 6, generator=generator).relu()


@pytest.mark.parametrize("batch", [1, 11, 1000])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("axis", list(SIZES))
def test_fvu_of_a_group_is_that_of_its_rows_alone(batch: int, scale: float, offset: float, axis: str):
    x, x_hat, f = sample(scale, offset)
    sae, site = summed(x, x_hat, f, batch)
    for group in range(SIZES[axis]):
        rows = groups()[axis] == group
        want = (x - x_hat)[rows].square().sum() / (x[rows] - x[rows].mean(0)).square().sum()
        assert part_fvu(float(sae.rows.axes[axis][group, 0]), site.axes[axis][group]) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("axis", list(SIZES))
def test_groups_of_an_axis_add_up_to_the_whole(axis: str):
    sae, site = summed(*sample(offset=3))
    assert float(variance(site.axes[axis].sum(0))) == pytest.approx(sae.reconstruction.centred_squares, rel=1e-12)
    assert float(sae.rows.axes[axis].sum(0)[2]) / len(groups()[axis]) == pytest.approx(sae.reconstruction.l0, rel=1e-12)


def test_an_error_that_depends_on_the_position_comes_back_exactly():
    """Errors of length position + 1 in every row; losses that rise by a tenth of the position."""
    x, _, f = sample()
    position = groups()["position"].double()
    x_hat = x.clone()
    x_hat[:, 0] += position + 1
    sae, site = summed(x, x_hat, f)
    clean = Tables.start(SIZES, 2, torch.device("cpu"))
    last = groups()["position"] == CONTEXT - 1
    counted = {axis: index[~last] for axis, index in groups().items()}
    losses = torch.full_like(position[~last], 2.5)
    clean.add(counted, torch.stack([torch.ones_like(losses), losses], dim=1))
    sae.losses.add(counted, torch.stack([losses + 0.1 * position[~last], losses], dim=1))
    curves = by_position(sae, site, clean)
    assert curves["position"] == list(range(CONTEXT))
    assert curves["count"] == [BLOCKS] * CONTEXT
    assert curves["error"] == pytest.approx([(t + 1) ** 2 for t in range(CONTEXT)], rel=1e-12)
    assert curves["delta_loss"][:-1] == pytest.approx([0.1 * t for t in range(CONTEXT - 1)], abs=1e-12)
    assert curves["delta_loss"][-1] is None
    assert curves["loss_count"] == [BLOCKS] * (CONTEXT - 1) + [0]
    segments = by_segment(sae, site, clean)
    assert segments["user"]["delta_loss"] == pytest.approx(0.2)
    assert segments["model"]["delta_loss"] == pytest.approx(0.5)
    assert segments["model"]["num_tokens"] == 2 * BLOCKS


def test_variance_at_a_position_of_equal_rows_is_no_number():
    x, x_hat, f = sample()
    x[groups()["position"] == 2] = torch.arange(D_IN).double()
    sae, site = summed(x, x_hat, f)
    curve = by_position(sae, site, Tables.start(SIZES, 2, torch.device("cpu")))["fvu"]
    assert curve[2] is None
    assert None not in curve[:2] + curve[3:]


def test_massive_rows_hold_what_they_hold():
    x, x_hat, f = sample()
    is_massive = torch.arange(len(x)) % 40 == 3
    x[is_massive] *= 50
    x_hat[is_massive] *= 50
    sae, _ = summed(x[~is_massive], x_hat[~is_massive], f[~is_massive])
    sae.massive.update(x[is_massive], x_hat[is_massive], f[is_massive])
    found = massive(sae, 8.0, 12.0)
    squares, about_mean = x.square().sum(1), (x - x.mean(0)).square().sum(1)
    assert found["share_of_squares"] == pytest.approx(float(squares[is_massive].sum() / squares.sum()), rel=1e-9)
    assert found["share_of_variance"] == pytest.approx(float(about_mean[is_massive].sum() / about_mean.sum()), rel=1e-9)
    assert found["l0"] == pytest.approx(float((f[is_massive] > 0).sum(1).double().mean()))
    assert (found["num_tokens"], found["max_norm"], found["norm_limit"]) == (int(is_massive.sum()), 8.0, 12.0)
    assert found["share_of_tokens"] == int(is_massive.sum()) / len(x)


def test_without_massive_rows_nothing_is_held():
    found = massive(summed(*sample())[0], None, float("inf"))
    assert (found["num_tokens"], found["share_of_squares"], found["l0"], found["norm_limit"]) == (0, 0, None, None)


def test_firing_counts_every_living_latent_once():
    f = torch.zeros(1000, 5)
    f[:, 0] = 1
    f[:50, 1] = 1
    f[:150, 2] = 1
    f[0, 3] = 1
    sums = ReconstructionSums.start(torch.zeros(2), 5)
    x = torch.randn(1000, 2)
    sums.update(x, x, f)
    found = firing(sums)
    assert sum(found["counts"]) == 4
    assert len(found["log10_edges"]) == len(found["counts"]) + 1
    filled = [edge for edge, count in zip(found["log10_edges"], found["counts"], strict=False) if count]
    assert filled == [-3.0, -1.5, -1.0, -0.25]
    assert (found["dead"], found["dense_1"], found["dense_10"]) == (0.2, 0.6, 0.4)
    assert found["dense_10_share_of_l0"] == pytest.approx(1150 / 1201)
