"""Transcoders in training: both engines against float64, the SAE as the case of one place, the skip, and folding."""

import copy
import math

import numpy as np
import pytest
import torch

from everyscope.base.errors import ConfigError
from everyscope.sae import pairs_cpu
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.normalisation import Normalisation, normalised_pair
from everyscope.sae.pairs_cpu import CpuPairs
from everyscope.sae.presets import fast, fast_transcoder
from everyscope.sae.skip_cpu import blocks_of, skip_gradient, subtract_skip
from everyscope.sae.thresholds import warm_start
from everyscope.sae.trainable import TENSORS, TrainableSae, catch_up, dense_update, fold, new_sae
from everyscope.train.engines import Dense
from everyscope.train.training_group import TargetSide, TrainingGroup

BY_ROW = {"direction_rate": 0.02, "warm_start": True, "largest_step": 1.5}
ROUNDING = 2e-6
"""Largest difference, relative to the largest value, between float32 sums in one order and float64 ones, at these sizes."""


def rows(batch, size, seed=0) -> torch.Tensor:
    x = torch.randn(batch, size, generator=torch.Generator().manual_seed(seed))
    return x / x.square().sum(1).mean().sqrt()


def sae_of(d_in, width, d_out=None, *, skip=False, threshold=0.4, **changes) -> TrainableSae:
    fields = {
        "learning_rate": 1e-4,
        "learning_rate_warmup_steps": 0,
        "sparsity_warmup_steps": 0,
        "bandwidth": 0.05,
        "initial_threshold": threshold,
    }
    preset = SaePreset(**fields | changes)
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=1e-2, preset=preset, skip=skip), d_in, d_out=d_out)
    generator = torch.Generator().manual_seed(1)
    for name in ("b_enc", "b_dec", *(["w_skip"] if skip else [])):
        sae.parameters[name].normal_(0, 0.05, generator=generator)
    return sae


def in_float64(sae: TrainableSae) -> TrainableSae:
    twin = copy.deepcopy(sae)
    for tensors in (twin.parameters, twin.squared):
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
    return twin


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("changes", [{}, {"prefix_shares": (0.2, 0.5, 1.0)}, BY_ROW])
@pytest.mark.parametrize(
    ("batch", "d_in", "d_out", "width", "threshold"),
    [(64, 16, 16, 40, 0.4), (200, 24, 9, 333, 0.6), (1, 8, 8, 9, 0.2), (70, 5, 30, 1000, 0.9), (150, 70, 64, 64, 0.2)],
)
def test_one_step_by_pairs_equals_the_float64_oracle(monkeypatch, batch, d_in, d_out, width, threshold, changes, skip):
    monkeypatch.setattr(pairs_cpu, "DENSE_SHARE", 1.0)
    x, y = rows(batch, d_in), rows(batch, d_out, seed=5)
    sae = sae_of(d_in, width, d_out, skip=skip, threshold=threshold, **changes)
    oracle, before = in_float64(sae), copy.deepcopy(sae)
    want = dense_update(oracle, x.double(), 0, 10, y.double())
    got = CpuPairs([sae])._pairs_step(0, x, 0, 10, y)
    assert got is not None
    for name in ("reconstruction", "l0", "pairs"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name).double(), rtol=1e-5, atol=1e-9)
    assert set(sae.parameters) == {*TENSORS, *(["w_skip"] if skip else [])}
    for name in sae.parameters:
        seen, expected = (one.squared[name].double().sqrt() for one in (sae, oracle))
        assert (seen - expected).abs().max() <= ROUNDING * expected.max() + 1e-12, name
    untouched = sae.touched == 0
    assert torch.equal(sae.parameters["W_dec"][untouched], before.parameters["W_dec"][untouched])


@pytest.mark.parametrize("changes", [{}, BY_ROW])
def test_three_hundred_steps_follow_the_float64_oracle(changes):
    sae = sae_of(24, 200, 16, skip=True, threshold=0.5, learning_rate=1e-3, **changes)
    oracle, start = in_float64(sae), copy.deepcopy(sae)
    engine, got, wanted = CpuPairs([sae]), 0.0, 0.0
    for step in range(300):
        x, y = rows(128, 24, seed=step), rows(128, 16, seed=1000 + step)
        losses = engine.step(x, step, 300, y)[0]
        want = dense_update(oracle, x.double(), step, 300, y.double())
        if step >= 270:
            got, wanted = got + losses.reconstruction.item(), wanted + want.reconstruction.item()
    catch_up(sae, 300)
    assert got == pytest.approx(wanted, rel=1e-3)
    for name in sae.parameters:
        moved = (oracle.parameters[name] - start.parameters[name]).norm()
        assert (sae.parameters[name] - oracle.parameters[name]).norm() < 5e-3 * moved, name


@pytest.mark.parametrize("engine", [CpuPairs, Dense])
def test_a_target_that_is_the_input_trains_the_sae_to_the_bit(engine):
    saes = [sae_of(24, 300, direction_rate=0.02, encoder_follows=True, warm_start=True) for _ in range(2)]
    engines = [engine([sae]) for sae in saes]
    for step in range(20):
        x = rows(100, 24, seed=step)
        engines[0].step(x, step, 20)
        engines[1].step(x, step, 20, x.clone())
    for name, tensor in saes[0].tensors().items():
        assert torch.equal(saes[1].tensors()[name], tensor), name


@pytest.mark.parametrize("engine", [CpuPairs, Dense])
def test_a_skip_frozen_at_zero_is_no_skip(engine):
    with_it = sae_of(24, 300, 20, skip=True, skip_learning_rate=0.0)
    with_it.parameters["w_skip"].zero_()
    without = sae_of(24, 300, 20)
    engines = [engine([sae]) for sae in (with_it, without)]
    for step in range(20):
        x, y = rows(100, 24, seed=step), rows(100, 20, seed=1000 + step)
        losses = [engine.step(x, step, 20, y)[0] for engine in engines]
        assert torch.equal(losses[0].reconstruction, losses[1].reconstruction)
    assert not with_it.parameters["w_skip"].any()
    for name in TENSORS:
        assert torch.equal(with_it.parameters[name], without.parameters[name]), name


@pytest.mark.parametrize("rounds_skips", [False, True])
def test_results_do_not_depend_on_threads(rounds_skips):
    saes = [sae_of(70, 900, 64, skip=True, **BY_ROW) for _ in range(2)]
    for sae, threads in zip(saes, (1, 2), strict=True):
        torch.set_num_threads(threads)
        engine = CpuPairs([sae], rounds_skips=rounds_skips)
        for step in range(5):
            engine.step(rows(700, 70, seed=step), step, 5, rows(700, 64, seed=9 + step))
    torch.set_num_threads(1)
    for name, tensor in saes[0].tensors().items():
        assert torch.equal(saes[1].tensors()[name], tensor), name


def test_rounded_products_of_a_skip_are_within_the_bounds_of_their_roundings():
    """Each factor, and each sum, is within 2^-8 of itself; float32's own roundings are nothing beside that."""
    (batch, d_in, d_out), u = (300, 70, 40), 2.0**-8
    x, y, w = rows(batch, d_in), rows(batch, d_out, seed=1), 0.3 * rows(d_in, d_out, seed=2)
    left = torch.empty(batch, d_out)
    for block in blocks_of(batch):
        subtract_skip(left, y, x.bfloat16(), w.bfloat16(), block)
    gradient = torch.cat([skip_gradient(x.bfloat16(), y.bfloat16(), block) for block in blocks_of(d_in)])
    for got, want, terms in (
        (left, y - x.double() @ w.double(), x.abs() @ w.abs()),
        (gradient, x.T.double() @ y.double(), x.abs().T @ y.abs()),
    ):
        off = (got - want).abs()
        assert (off <= ((1 + u) ** 3 - 1) * terms + 1e-6).all()
        assert off.norm() > 1e-5 * want.norm(), "nothing was rounded"
    exact = torch.empty(batch, d_out)
    for block in blocks_of(batch):
        subtract_skip(exact, y, x, w, block)
    torch.testing.assert_close(exact.double(), y - x.double() @ w.double(), rtol=1e-5, atol=1e-6)


def test_with_rounded_products_three_hundred_steps_follow_the_float64_oracle():
    sae = sae_of(24, 200, 16, skip=True, threshold=0.5, learning_rate=1e-3, **BY_ROW)
    oracle, start = in_float64(sae), copy.deepcopy(sae)
    engine, got, wanted = CpuPairs([sae], rounds_skips=True), 0.0, 0.0
    for step in range(300):
        x, y = rows(128, 24, seed=step), rows(128, 16, seed=1000 + step)
        losses = engine.step(x, step, 300, y)[0]
        want = dense_update(oracle, x.double(), step, 300, y.double())
        if step >= 270:
            got, wanted = got + losses.reconstruction.item(), wanted + want.reconstruction.item()
    assert got == pytest.approx(wanted, rel=2e-3)
    moved = (oracle.parameters["w_skip"] - start.parameters["w_skip"]).norm()
    assert (sae.parameters["w_skip"] - oracle.parameters["w_skip"]).norm() < 2e-2 * moved


@pytest.mark.parametrize("engine", ["dense", "pairs"])
def test_the_skip_alone_learns_a_linear_map(engine):
    """With thresholds that nothing reaches, y = x @ M is left to the skip: FVU 0 to 1e-6."""
    steps, d_in, d_out = 1500, 12, 10
    preset = SaePreset(
        learning_rate=3e-2, learning_rate_warmup_steps=0, learning_rate_decay=0.6, initial_threshold=1e3, sparsity_warmup_steps=0
    )
    m = torch.randn(d_in, d_out, generator=torch.Generator().manual_seed(3))
    x = torch.randn(4000, d_in, generator=torch.Generator().manual_seed(4)) + 0.5
    y = x @ m + 2.0
    sides = [Normalisation(float(side.square().sum(1).mean().sqrt())) for side in (x, y)]
    config = SaeConfig(width=8, sparsity_coefficient=0.0, preset=preset, skip=True)
    group = TrainingGroup([config], d_in, sides[0], steps, engine=engine, target=TargetSide(d_out, sides[1]))
    for step in range(steps):
        some = torch.arange(step * 256, (step + 1) * 256) % len(x)
        group.step(x[some], y[some])
    coder = group.folded()[0]
    fvu = (coder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert fvu < 1e-6
    assert coder.W_skip is not None
    torch.testing.assert_close(coder.W_skip, m, rtol=0, atol=2e-3)


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_folding_changes_nothing(is_centred, skip):
    g = torch.Generator().manual_seed(7)
    d_in, d_out = 10, 6
    means = [np.random.default_rng(side).normal(size=size) if is_centred else None for side, size in ((0, d_in), (1, d_out))]
    sides = Normalisation(3.7, means[0]), Normalisation(0.21, means[1])
    sae = in_float64(sae_of(d_in, 50, d_out, skip=skip, threshold=0.1))
    x = 4 * torch.randn(200, d_in, generator=g, dtype=torch.float64)
    shift = [
        torch.zeros(size, dtype=torch.float64) if mean is None else torch.from_numpy(mean)
        for mean, size in zip(means, (d_in, d_out), strict=True)
    ]
    want = sae((x - shift[0]) / sides[0].scale) * sides[1].scale + shift[1]
    coder = fold(sae, *sides)
    assert coder.is_transcoder
    torch.testing.assert_close(coder.double()(x), want, rtol=1e-5, atol=1e-5)  # folded tensors are float32
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(50, dtype=torch.float64), rtol=1e-6, atol=0)
    latents = sae.encode((x - shift[0]) / sides[0].scale)
    torch.testing.assert_close(coder.encode(x), sides[1].scale * latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("massive", [[], [3], [0, 1], [9], [2, 3, 4]])
def test_what_is_massive_on_either_side_is_left_out_on_both(massive):
    x, y = rows(10, 4) + 1, rows(10, 3, seed=2) + 1
    for place, row in enumerate(massive):
        (x, y)[place % 2][row] *= 1e4
    got = normalised_pair(Normalisation(2.0, None, 100.0), Normalisation(5.0, None, 100.0), x.clone(), y.clone())
    usual = [row for row in range(10) if row not in massive]
    for row in range(10):
        stands_for = row if row in usual else max((other for other in usual if other < row), default=usual[0])
        torch.testing.assert_close(got[0][row], x[stands_for] / 2)
        torch.testing.assert_close(got[1][row], y[stands_for] / 5)


def test_each_side_is_shortened_by_its_own_norm():
    x, y = torch.ones(3, 4), torch.ones(3, 5)
    x[1] *= 50
    y[2] *= 70
    got = normalised_pair(Normalisation(1.0, largest_row=3.0), Normalisation(1.0, largest_row=3.0), x, y)
    assert [round(float(row.norm()), 4) for row in got[0]] == [2.0, 3.0, 2.0]
    assert [round(float(row.norm()), 4) for row in got[1]] == [round(math.sqrt(5), 4), round(math.sqrt(5), 4), 3.0]


def test_a_warm_start_takes_its_bias_from_the_target_and_its_thresholds_from_the_input():
    x, y = rows(256, 16) + 0.3, rows(256, 9, seed=4) - 0.2
    preset = SaePreset(warm_start=True)
    sae = new_sae(SaeConfig(width=100, target_l0=7, preset=preset), 16, d_out=9)
    warm_start(sae, x, target=y)
    torch.testing.assert_close(sae.parameters["b_dec"], y.mean(0))
    active = (x @ sae.parameters["W_enc"] > sae.parameters["threshold"]).sum(1).float().mean()
    assert float(active) == pytest.approx(7, abs=0.02)


@pytest.mark.parametrize("d_out", [16, 9])
def test_the_start_is_drawn_by_seed_alone_and_shards_are_parts_of_it(d_out):
    config = SaeConfig(width=50, sparsity_coefficient=0, seed=3)
    whole, part = new_sae(config, 16, d_out=d_out), new_sae(config, 16, latents=range(20, 35), d_out=d_out)
    for name, axis in (("W_enc", 1), ("W_dec", 0)):
        assert torch.equal(whole.parameters[name].narrow(axis, 20, 15), part.parameters[name]), name
    rows_of_w_enc = whole.parameters["W_enc"].T
    torch.testing.assert_close(rows_of_w_enc.norm(dim=1), torch.ones(50))
    assert torch.equal(rows_of_w_enc, whole.parameters["W_dec"]) == (d_out == 16)


def test_what_is_not_a_transcoders_is_refused():
    side = TargetSide(8, Normalisation(1.0))
    follows = SaeConfig(width=8, target_l0=2, preset=fast(8))
    with pytest.raises(ConfigError, match="fast_transcoder"):
        TrainingGroup([follows], 8, Normalisation(1.0), 5, target=side)
    TrainingGroup([SaeConfig(width=8, target_l0=2, preset=fast_transcoder(8))], 8, Normalisation(1.0), 5, target=side)
    with pytest.raises(ConfigError, match="skip=True of an SAE"):
        TrainingGroup([SaeConfig(width=8, target_l0=2, skip=True)], 8, Normalisation(1.0), 5)
