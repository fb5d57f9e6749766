"""The bfloat16 engine of a GPU: its kernels against their slow twin, its gradients against float64.

Runs on a CUDA device or, where there is none, in Triton's interpreter on the CPU.

The twin (benchmarks/rounding.py) rounds where the kernels round. Both sum in different orders, so that now and then a sum next to
the middle between two bfloat16 numbers is rounded the other way: one number of thousands is then off by 2^-7 of itself, which
moves the norm of all by some 1e-4.

Against float64 the tolerance is a bound, number by number, made of nothing but what rounding to bfloat16 can do: u = 2^-8 of a
number at most. It holds for the pairs that the engine took; these may differ from float64's only where a pre-activation lies
nearer to a border than its own bound.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from gpu_problems import (
    BY_ROW,
    DEVICE,
    INTERPRETED,
    NESTED,
    REASON,
    RECIPE,
    RUNS,
    assert_near,
    batches,
    moved,
    problem,
    transcoder_problem,
)
from torch import Tensor

from everyscope.sae import crossover
from everyscope.sae.crossover import Timed, crossing, measured_crossover
from everyscope.sae.functional import without_parallel_part
from everyscope.sae.trainable import TrainableSae, move_along

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rounding import rounded_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS, reason=REASON)]
if RUNS:
    from everyscope.sae import bf16_gpu, gpu_work
    from everyscope.sae.bf16_gpu import LAG, GpuBfloat16

U = 2.0**-8
"""What rounding to bfloat16 takes of a number at most."""
TWIN = 1e-3
PAIRS, DENSE = 1e9, -1.0
"""Crossovers that leave one way."""


def engine_of(*saes: TrainableSae, way: float = PAIRS, max_pairs: int | None = None) -> "GpuBfloat16":
    """An engine past its dense beginning."""
    engine = GpuBfloat16(saes, max_pairs=max_pairs, crossover=way)
    engine.tensors()["uses_pairs"].fill_(way == PAIRS)
    return engine


def assert_step_equals_twin(sae: TrainableSae, x: Tensor, way: float, y: Tensor | None = None) -> TrainableSae:
    ours, twin = moved(sae, DEVICE, torch.float32), moved(sae, DEVICE, torch.float64)
    (losses,) = engine_of(ours, way=way, max_pairs=x.shape[0] * sae.config.width).step(x, 0, 10, y)
    gradients = rounded_gradients(twin, x.double(), 0, is_dense=way == DENSE, target=None if y is None else y.double())
    want = move_along(twin, gradients, 0, 10)
    assert float(losses.l0) == pytest.approx(float(want.l0), rel=1e-6)
    assert float(losses.pairs) == pytest.approx(float(want.pairs), rel=1e-6)
    assert float(losses.reconstruction) == pytest.approx(float(want.reconstruction), rel=1e-4)
    assert torch.equal(losses.fired.double(), want.fired)
    for name in sae.parameters:
        assert_near(ours.squared[name].sqrt(), twin.squared[name].sqrt(), TWIN, f"gradient of {name}")
        change = [new.parameters[name].double() - sae.parameters[name].double() for new in (ours, twin)]
        assert_near(*change, tolerance=TWIN, what=f"change of {name}")
    return ours


SHAPES = [(37, 40, 67, RECIPE), (33, 24, 50, NESTED), (5, 2304, 9, RECIPE), (1, 3, 2, RECIPE), (37, 40, 67, BY_ROW)]


@pytest.mark.parametrize("way", [PAIRS, DENSE])
@pytest.mark.parametrize(("rows", "d_in", "width", "preset"), SHAPES)
def test_a_step_equals_its_slow_twin(rows, d_in, width, preset, way):
    sae, x = problem(rows, d_in, width, preset)
    ours = assert_step_equals_twin(sae, x, way)
    norms = ours.parameters["W_dec"].norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("way", [PAIRS, DENSE])
@pytest.mark.parametrize(
    ("rows", "d_in", "width", "preset"), [(37, 40, 67, RECIPE), (33, 24, 50, NESTED), (37, 40, 67, BY_ROW), (5, 20, 30, RECIPE)]
)
def test_a_step_of_a_transcoder_equals_its_slow_twin(rows, d_in, width, preset, way, skip):
    sae, x, y = transcoder_problem(rows, d_in, width, preset, skip=skip)
    assert_step_equals_twin(sae, x, way, y)


def test_latents_of_many_segments_and_latents_that_rest(monkeypatch):
    for module in (gpu_work, bf16_gpu):
        monkeypatch.setattr(module, "ROUNDED_SEGMENT", 8)  # so that a latent of 37 pairs has five of them
    sae, x = problem(37, 24, 41, NESTED)
    sae.parameters["b_enc"][[3, 17]] = 2.0
    sae.parameters["b_enc"][[0, 40]] = -9.0
    for way in (PAIRS, DENSE):
        ours = assert_step_equals_twin(sae, x, way)
        for name in ("W_enc", "W_dec"):
            rows = [each.parameters[name].T if name == "W_enc" else each.parameters[name] for each in (ours, sae)]
            assert torch.equal(rows[0][[0, 40]], rows[1][[0, 40]])
        assert ours.touched[[0, 40]].tolist() == [0, 0]


@dataclass(frozen=True)
class Bounded:
    """A float64 tensor, and how far from it a computed one may be, number by number."""

    value: Tensor
    error: Tensor


def rounded(tensor: Bounded) -> Bounded:
    return replace(tensor, error=tensor.error + U * (tensor.value.abs() + tensor.error))


def times(a: Bounded, b: Bounded) -> Bounded:
    """A product of matrices: (|a| + da)(|b| + db) - |a||b| is the most that its terms can be off."""
    most = (a.value.abs() + a.error) @ (b.value.abs() + b.error)
    return Bounded(a.value @ b.value, most - a.value.abs() @ b.value.abs())


def where(mask: Tensor, tensor: Bounded) -> Bounded:
    return Bounded(tensor.value * mask, tensor.error * mask)


def transposed(tensor: Bounded) -> Bounded:
    return Bounded(tensor.value.T, tensor.error.T)


def bounded_gradients(
    sae: TrainableSae, x: Tensor, pre_seen: Tensor, is_dense: bool, y: Tensor | None = None
) -> dict[str, Bounded]:
    """Gradients in float64 at the pairs that `pre_seen` has, with the bounds that follow from where the engine rounds."""
    y = x if y is None else y
    p, (rows, half) = sae.parameters, (len(x), sae.config.preset.bandwidth / 2)
    exact = {name: Bounded(tensor, torch.zeros_like(tensor)) for name, tensor in p.items()}
    centred = rounded(Bounded(sae.seen(x), torch.zeros_like(x)))
    W_enc, W_dec = rounded(exact["W_enc"]), rounded(exact["W_dec"])
    product = rounded(times(centred, W_enc))
    pre = Bounded(product.value + p["b_enc"], product.error)
    active, near = pre_seen > p["threshold"], (pre_seen - p["threshold"]).abs() < half
    distance = (pre.value - p["threshold"]).abs()
    small = 1e-6 * (pre.value.abs() + p["threshold"])  # float32's own roundings
    assert ((active == (pre.value > p["threshold"])) | (distance <= pre.error + small)).all()
    assert ((near == (distance < half)) | ((distance - half).abs() <= pre.error + small)).all()
    again = rounded if is_dense else lambda tensor: tensor
    f = again(where(active, pre))
    reconstruction = times(f, W_dec)
    if "w_skip" in p:
        skipped = times(centred, rounded(exact["w_skip"]))
        reconstruction = Bounded(reconstruction.value + skipped.value, reconstruction.error + skipped.error)
    error = Bounded((reconstruction.value + p["b_dec"] - y) * 2 / rows, reconstruction.error * 2 / rows)
    e = rounded(error)
    d_f = again(times(e, transposed(W_dec)))
    d_pre = where(active, d_f)
    d_W_dec, d_b_enc = times(transposed(f), e), Bounded(d_pre.value.sum(0), d_pre.error.sum(0))
    from_latents = times(exact["W_enc"], d_b_enc)
    if sae.is_transcoder:
        from_latents = Bounded(torch.zeros_like(p["b_dec"]), torch.zeros_like(p["b_dec"]))
    skips = {"w_skip": times(transposed(centred), e)} if "w_skip" in p else {}
    along = (d_W_dec.error * p["W_dec"].abs()).sum(1, keepdim=True) * p["W_dec"].abs()
    near_d_f, bandwidth = where(near, d_f), sae.config.preset.bandwidth
    limit, coefficient = sae.config.preset.frequency_limit, sae.config.sparsity_coefficient
    assert limit is not None
    cost = coefficient + 0.2 / limit * (active.sum(0) / rows / limit - 1).clamp(min=0)
    d_threshold = (p["threshold"] * near_d_f.value.sum(0) + near.sum(0) * cost / rows) / -bandwidth
    return {
        "W_enc": transposed(times(transposed(d_pre), centred)),
        "W_dec": Bounded(without_parallel_part(d_W_dec.value, p["W_dec"]), d_W_dec.error + along),
        "b_enc": d_b_enc,
        "b_dec": Bounded(error.value.sum(0) - from_latents.value, error.error.sum(0) + from_latents.error),
        "threshold": Bounded(d_threshold, p["threshold"] * near_d_f.error.sum(0) / bandwidth),
        **skips,
    }


@pytest.mark.parametrize("way", [PAIRS, DENSE])
@pytest.mark.parametrize(("rows", "d_in", "width", "skip"), [(64, 40, 67, None), (24, 576, 40, None), (64, 40, 67, True)])
def test_gradients_are_within_the_bounds_of_their_roundings(rows, d_in, width, way, skip):
    sae, x, y = (*problem(rows, d_in, width), None) if skip is None else transcoder_problem(rows, d_in, width, skip=skip)
    ours, before = moved(sae, DEVICE, torch.float32), moved(sae, DEVICE, torch.float64)
    engine = engine_of(ours, way=way, max_pairs=rows * width)
    engine.step(x, 0, 10, y)
    pre_seen = engine._work_for(rows, d_in, ours).pre.double() + before.parameters["b_enc"]
    wanted = bounded_gradients(before, x.double(), pre_seen, way == DENSE, None if y is None else y.double())
    assert wanted.keys() == sae.parameters.keys()
    for name, want in wanted.items():
        got = (ours.squared[name].double() / (1 - RECIPE.beta2)).sqrt()  # a fresh mean of squares shows the gradient's size
        off, size = (got - want.value.abs()).abs(), want.value.norm() / want.value.numel() ** 0.5
        assert (off <= 1.001 * want.error + 1e-5 * size).all(), f"{name}: {(off / want.error).max():.2f} of the bound"
        assert off.norm() < 0.03 * want.value.norm(), f"{name}: bounds are of the worst case, errors much smaller"
        assert off.norm() > 1e-5 * want.value.norm(), f"{name}: nothing was rounded"


def assert_copies_are_of_the_parameters(engine: "GpuBfloat16") -> None:
    for rounded_sae in engine._rounded:
        assert torch.equal(rounded_sae.weights.enc, rounded_sae.sae.parameters["W_enc"].T.bfloat16())
        assert torch.equal(rounded_sae.weights.dec, rounded_sae.sae.parameters["W_dec"].bfloat16())
        if rounded_sae.skip is not None:
            assert torch.equal(rounded_sae.skip, rounded_sae.sae.parameters["w_skip"].bfloat16())


@pytest.mark.parametrize("skip", [None, True])
@pytest.mark.parametrize("preset", [RECIPE, BY_ROW])
def test_lazy_decay_equals_dense_steps_of_the_twin_also_where_ways_change(preset, skip):
    sae, _ = problem(1, 20, 45, preset) if skip is None else transcoder_problem(1, 20, 45, preset, skip=skip)[:2]
    twin = moved(sae, DEVICE, torch.float64)
    engine = engine_of(sae, max_pairs=12 * 45)
    for step, x in enumerate(batches(sae, 6)):
        engine.tensors()["uses_pairs"].fill_(step not in (2, 3))
        engine.tensors()["crossover"].fill_(DENSE if step in (2, 3) else PAIRS)
        y = None if skip is None else x.flip(1)
        engine.step(x, step, 6, y)
        target = None if y is None else y.double()
        move_along(twin, rounded_gradients(twin, x.double(), step, is_dense=step in (2, 3), target=target), step, 6)
        assert_copies_are_of_the_parameters(engine)
    assert sae.touched.unique().numel() > 2  # latents were left alone, for different times
    for name in sae.parameters:
        assert_near(sae.parameters[name], twin.parameters[name], TWIN, name)


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_does_not_fit_changes_nothing(skip):
    sae, x, y = transcoder_problem(12, 20, 45, skip=True) if skip else (*problem(12, 20, 45), None)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    engine = engine_of(sae, max_pairs=7)
    (losses,) = engine.step(x, 0, 5, y)
    assert all(torch.equal(sae.tensors()[name], tensor) for name, tensor in before.items())
    assert engine.tensors()["skipped"].tolist() == [1]
    assert float(losses.pairs) * 12 > 7
    assert engine.tensors()["counts"][0].item() > 7
    x[3, 3] = torch.nan
    assert engine.step(x, 1, 5, y)[0].reconstruction.isnan()


@pytest.mark.parametrize("way", [PAIRS, DENSE])
def test_what_is_not_a_number_is_noticed(way):
    sae, x = problem(6, 20, 11)
    x[2, 5] = torch.nan
    (losses,) = engine_of(sae, way=way, max_pairs=66).step(x, 0, 5)
    assert losses.reconstruction.isnan()


def test_two_runs_give_the_same_bits_also_from_a_checkpoint_and_with_many_saes():
    ends = []
    for broken in (False, True):
        saes = [problem(1, 20, width, preset)[0] for width, preset in ((23, RECIPE), (15, NESTED), (23, BY_ROW))]
        engine = engine_of(*saes)
        for step, x in enumerate(batches(saes[0], 3)):
            engine.tensors()["uses_pairs"][1] = False
            engine.tensors()["crossover"][1] = DENSE
            if broken and step == 2:
                saes = [moved(sae, DEVICE, torch.float32) for sae in saes]
                fresh = GpuBfloat16(saes)
                for name, tensor in engine.tensors().items():
                    fresh.tensors()[name].copy_(tensor)
                engine = fresh
            losses = engine.step(x, step, 3)
        ends.append([*(t for sae in saes for t in sae.tensors().values()), *(loss.reconstruction for loss in losses)])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_the_way_is_chosen_by_an_old_count_and_the_crossover():
    sae, _ = problem(1, 12, 20)
    engine = GpuBfloat16([sae], max_pairs=12 * 20, crossover=0.9)
    ways = []
    for step, x in enumerate(batches(sae, LAG + 3)):
        if step == LAG + 1:
            engine.tensors()["counts"][(step + 1) % LAG] = 12 * 20  # as if all had been pairs, LAG steps before the last
        engine.step(x, step, 20)
        ways.append(bool(engine.tensors()["uses_pairs"]))
    assert ways == [False] * LAG + [True, True, False]


def test_small_saes_have_memory_of_their_own(monkeypatch):
    saes = [problem(1, 12, 20)[0] for _ in range(2)]
    for limit, are_apart in ((12 * 20, True), (12 * 20 - 1, False)):
        monkeypatch.setattr("everyscope.sae.gpu_limits.APART", limit)
        engine = GpuBfloat16(saes, max_pairs=16, crossover=0.5)
        works = [engine._work_for(12, 12, sae, number) for number, sae in enumerate(saes)]
        assert (works[0] is not works[1]) == are_apart


def test_an_unmeasured_crossover_is_kept_in_the_state():
    sae, x = problem(12, 12, 20)
    engine = GpuBfloat16([sae], max_pairs=120)
    assert engine.tensors()["crossover"].isnan().all()
    engine.step(x, 0, 2)
    if INTERPRETED:  # nothing is timed: half of what the lists hold
        assert engine.tensors()["crossover"].tolist() == [0.25]
    assert 0 <= float(engine.tensors()["crossover"]) <= 0.25


def test_numbers_of_a_step_do_not_depend_on_where_a_table_begins(monkeypatch):
    sae, _ = problem(1, 12, 20, BY_ROW)
    seen = []
    for table_steps in (1, 3, 100):
        monkeypatch.setattr(bf16_gpu, "TABLE_STEPS", table_steps)
        engine, numbers = engine_of(sae), []
        for step in range(7):
            engine.prepare(12, step, 7)
            numbers.append(engine._numbers.clone())
        seen.append(torch.stack(numbers))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert seen[0][:, 0, 0].tolist() == list(range(1, 8))


def test_crossing_is_where_the_line_meets_the_dense_time():
    few, many = Timed(0.01, 2.0), Timed(0.03, 4.0)
    assert crossing(few, many, 3.0) == pytest.approx(0.02)
    assert crossing(few, many, 5.0) == pytest.approx(0.04)
    assert crossing(few, many, 0.5) == 0.0  # never by pairs
    assert crossing(few, Timed(0.03, 2.0), 3.0) == 1.0  # never densely
    assert crossing(few, Timed(0.03, 2.0), 1.0) == 0.0


def test_the_crossover_is_measured_at_the_shares_that_it_names(monkeypatch):
    monkeypatch.setattr(crossover, "CALLS", 1)
    monkeypatch.setattr(crossover, "ROUNDS", 1)
    monkeypatch.setattr(crossover, "SHARES", (0.05, 0.2))
    sae, _ = problem(1, 16, 40)
    engines = []

    class Made(GpuBfloat16):
        def __init__(self, saes, **kwargs):
            super().__init__(saes, **kwargs)
            engines.append(self)

    def clock(call) -> float:
        call()
        assert bool(engines[-1].tensors()["uses_pairs"]) == (len(engines) < 3)
        return [1.0, 3.0, 2.0][len(engines) - 1]

    share = measured_crossover(sae, 32, Made, clock)
    assert len(engines) == 3
    assert 0.05 < share < 0.4  # between both, and more, for pairs near a threshold count too


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    sae, x = problem(256, 128, 1000)
    engine = engine_of(sae)
    engine.step(x, 0, 5)  # compiles, and makes its buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(x, 1, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
