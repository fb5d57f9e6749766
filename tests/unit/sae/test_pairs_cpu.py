"""Training by pairs on the CPU: the dense step's results, at any thread count, whatever the screen let through."""

import copy

import numpy as np
import pytest
import torch

from everyscope.sae import pairs_cpu
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.kernels.cpu import Candidates, Rows, centre_rows, screen_rows
from everyscope.sae.pairs_cpu import CpuPairs, as_bfloat16, latents_of
from everyscope.sae.trainable import TENSORS, TrainableSae, catch_up, dense_update, new_sae

BY_ROW = {"direction_rate": 0.02, "encoder_follows": True, "warm_start": True, "largest_step": 1.5}
ROUNDING = 2e-6
"""Largest difference, relative to the largest value, between float32 sums in one order and float64 ones, at these sizes."""


def rows(batch, d_in, seed=0, huge=False) -> torch.Tensor:
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed))
    x /= x.square().sum(1).mean().sqrt()
    if huge:
        x[::7] *= 1e4
    return x


def sae_of(d_in, width, threshold=0.4, **changes) -> TrainableSae:
    fields = {
        "learning_rate": 1e-4,
        "learning_rate_warmup_steps": 0,
        "sparsity_warmup_steps": 0,
        "bandwidth": 0.05,
        "initial_threshold": threshold,
    }
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=1e-2, preset=SaePreset(**fields | changes)), d_in)
    generator = torch.Generator().manual_seed(1)
    for name in ("b_enc", "b_dec"):
        sae.parameters[name].normal_(0, 0.05, generator=generator)
    sae.coordinate_weights.uniform_(0.5, 1.5, generator=generator)
    return sae


def in_float64(sae: TrainableSae) -> TrainableSae:
    twin = copy.deepcopy(sae)
    for tensors in (twin.parameters, twin.squared):
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
    return twin


def gradients_seen(after: TrainableSae, before: TrainableSae) -> dict[str, torch.Tensor]:
    """Squared gradients of a first step, from the means it left."""
    return {name: after.squared[name].double() / (1 - before.config.preset.beta2) for name in TENSORS}


@pytest.mark.parametrize(
    ("batch", "d_in", "width", "threshold"),
    [(64, 16, 40, 0.4), (200, 24, 333, 0.6), (1, 8, 9, 0.2), (70, 5, 1000, 0.9), (300, 33, 64, 0.0), (40, 16, 64, 50.0)],
)
@pytest.mark.parametrize("changes", [{}, {"prefix_shares": (0.2, 0.5, 1.0)}, BY_ROW])
def test_one_step_equals_the_float64_oracle(monkeypatch, batch, d_in, width, threshold, changes):
    monkeypatch.setattr(pairs_cpu, "DENSE_SHARE", 1.0)
    x = rows(batch, d_in)
    sae = sae_of(d_in, width, threshold or 1e-3, **changes)
    oracle, before = in_float64(sae), copy.deepcopy(sae)
    want = dense_update(oracle, x.double(), 0, 10)
    engine = CpuPairs([sae])
    got = engine._pairs_step(0, x, 0, 10, x)
    assert got is not None
    for name in ("reconstruction", "l0", "pairs"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name).double(), rtol=1e-5, atol=1e-9)
    for name in TENSORS:
        seen, expected = gradients_seen(sae, before)[name].sqrt(), gradients_seen(oracle, before)[name].sqrt()
        assert (seen - expected).abs().max() <= ROUNDING * expected.max() + 1e-12, name
    untouched = sae.touched == 0
    assert torch.equal(sae.parameters["W_dec"][untouched], before.parameters["W_dec"][untouched])


@pytest.mark.parametrize("changes", [{}, BY_ROW])
def test_three_hundred_steps_follow_the_float64_oracle(changes):
    """Thresholds decide alike but for pre-activations within rounding of them, whose latents then part by a step's noise."""
    sae = sae_of(24, 200, 0.5, learning_rate=1e-3, **changes)
    oracle, start = in_float64(sae), copy.deepcopy(sae)
    engine, got, wanted = CpuPairs([sae]), 0.0, 0.0
    for step in range(300):
        x = rows(128, 24, seed=step)
        losses = engine.step(x, step, 300)[0]
        want = dense_update(oracle, x.double(), step, 300)
        if step >= 270:  # the mean of some steps: after one such decision a single step's loss is off by that one latent
            got, wanted = got + losses.reconstruction.item(), wanted + want.reconstruction.item()
    catch_up(sae, 300)
    assert got == pytest.approx(wanted, rel=1e-3)
    for name in TENSORS:
        moved = (oracle.parameters[name] - start.parameters[name]).norm()
        assert (sae.parameters[name] - oracle.parameters[name]).norm() < 5e-3 * moved, name
        assert (sae.squared[name] - oracle.squared[name]).norm() < 5e-3 * oracle.squared[name].norm(), name


@pytest.mark.parametrize("changes", [{}, BY_ROW])
def test_latents_that_rest_decay_as_if_they_had_not(changes):
    x = [rows(8, 12, seed) for seed in range(40)]
    sae = sae_of(12, 500, 0.9, **changes)
    dense = copy.deepcopy(sae)
    engine = CpuPairs([sae])
    for step in range(40):
        engine.step(x[step], step, 40)
        dense_update(dense, x[step], step, 40)
    assert sae.touched.min() < 35
    assert (sae.touched > 0).float().mean() > 0.2
    catch_up(sae, 40)
    for name in TENSORS:
        torch.testing.assert_close(sae.squared[name], dense.squared[name], rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(sae.parameters[name], dense.parameters[name], rtol=1e-3, atol=1e-5)


def test_rows_with_huge_norms_are_pairs_of_their_own():
    x = rows(90, 16, huge=True)
    sae = sae_of(16, 64)
    oracle, before = in_float64(sae), copy.deepcopy(sae)
    dense_update(oracle, x.double(), 0, 10)
    CpuPairs([sae]).step(x, 0, 10)
    for name in TENSORS:
        seen, expected = gradients_seen(sae, before)[name].sqrt(), gradients_seen(oracle, before)[name].sqrt()
        assert torch.isfinite(seen).all()
        assert (seen - expected).abs().max() <= 1e-5 * expected.max(), name


def test_results_do_not_depend_on_threads():
    x = rows(700, 24)
    saes = [sae_of(24, 900, **BY_ROW) for _ in range(2)]
    for sae, threads in zip(saes, (1, 2), strict=True):
        torch.set_num_threads(threads)
        engine = CpuPairs([sae])
        for step in range(5):
            engine.step(x, step, 5)
    torch.set_num_threads(1)
    for name, tensor in saes[0].tensors().items():
        assert torch.equal(saes[1].tensors()[name], tensor), name


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_the_screen_never_loses_a_pair(scale):
    """Weights and rows at the worst of bfloat16's rounding, with thresholds a hair below the float32 product."""
    generator = torch.Generator().manual_seed(4)
    d_in, width, batch = 48, 160, 64
    bits = torch.randint(-(2**31), 2**31 - 1, (batch + width, d_in), generator=generator, dtype=torch.int64).to(torch.int32)
    mantissas = (bits & 0x00FFFFFF) | 0x3F008000  # half a unit of bfloat16 is lost of every number, up or down
    numbers = mantissas.view(torch.float32) * torch.where(bits < 0, -1.0, 1.0) * scale
    x, w = numbers[:batch].contiguous(), numbers[batch:].contiguous()
    sae = sae_of(d_in, width, bandwidth=1e-6 * scale)
    sae.parameters["W_enc"].copy_(w.T)
    sae.parameters["b_enc"].zero_()
    sae.parameters["b_dec"].zero_()
    pre = x.double() @ w.double().T
    for row in range(batch):
        sae.parameters["threshold"].copy_((pre[row] - 1e-6 * pre[row].abs()).float())
        latents = latents_of(sae)
        pairs_cpu.round_weights(latents)
        found = screened_candidates(x[row : row + 1], latents, sae.config.preset.bandwidth)
        assert found.tolist() == list(range(width))


def screened_candidates(x, latents, bandwidth) -> np.ndarray:
    batch, d_in = x.shape
    width = len(latents.threshold)
    rounded = torch.empty(batch, d_in, dtype=torch.bfloat16)
    table = Rows(
        x=x.numpy(),
        target=x.numpy(),
        centred=np.empty((batch, d_in), np.float32),
        rounded=rounded.view(torch.int16).numpy().view(np.uint16),
        norms=np.empty(batch, np.float32),
        residuals=np.empty(batch, np.float32),
        errors=np.empty((batch, 1, d_in), np.float32),
        squares=np.empty(batch, np.float32),
        d_b_dec=np.empty((1, d_in), np.float32),
    )
    centre_rows(table, np.zeros(d_in, np.float32), 0, batch)
    assert torch.equal(rounded, x.bfloat16())
    screened = torch.mm(rounded, as_bfloat16(latents.w_rounded).T).view(torch.int16).numpy()
    hits = np.zeros(-(-width // 8) * 8, np.int8)
    found = Candidates(
        row=np.empty(batch * width, np.int32),
        latent=np.empty(batch * width, np.int32),
        start=np.empty(width + 1, np.int32),
        row_by_latent=np.empty(batch * width, np.int32),
        bounds=np.empty((pairs_cpu.LEVELS, width), np.int16),
        level=np.empty(batch, np.int32),
        hits=hits,
        eight_hits=hits.view(np.int64),
    )
    count = screen_rows(0, screened, table, latents, np.float32(bandwidth), found)
    return np.sort(found.latent[:count])


def test_a_screen_that_lets_almost_all_through_is_of_no_use(monkeypatch):
    """The margin is small: of products far below their threshold hardly any becomes a candidate."""
    sae = sae_of(64, 500, threshold=0.5)
    latents = CpuPairs([sae])._latents[0]
    found = screened_candidates(rows(1, 64), latents, 0.001)
    pre = rows(1, 64) @ sae.parameters["W_enc"] + sae.parameters["b_enc"]
    assert (pre > 0.5).sum() <= len(found) <= (pre > 0.48).sum()


def test_a_dense_code_is_stepped_densely_and_a_sparse_one_by_pairs_again():
    sae = sae_of(16, 64, 1e-3)
    dense = copy.deepcopy(sae)
    engine = CpuPairs([sae])
    x = rows(100, 16)
    for step in range(3):
        engine.step(x, step, 20)
        dense_update(dense, x, step, 20)
    assert not engine.tensors()["uses_pairs"]
    for name, tensor in dense.tensors().items():
        assert torch.equal(sae.tensors()[name], tensor)
    sae.parameters["threshold"].fill_(0.7)
    engine.step(x, 3, 20)
    assert engine.tensors()["uses_pairs"]
    before = copy.deepcopy(sae)
    got = engine.step(x, 4, 20)[0]
    want = dense_update(before, x, 4, 20)
    assert got.l0 == want.l0
    torch.testing.assert_close(sae.parameters["W_dec"], before.parameters["W_dec"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spoil", ["x", "W_enc", "W_dec", "b_enc", "b_dec"])
def test_what_is_no_number_shows_in_the_loss(spoil):
    sae, x = sae_of(16, 64), rows(50, 16)
    (x if spoil == "x" else sae.parameters[spoil])[..., 3] = torch.nan
    assert CpuPairs([sae]).step(x, 0, 10)[0].reconstruction.isnan()
