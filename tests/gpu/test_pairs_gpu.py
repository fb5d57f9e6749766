"""Training by pairs on a GPU against the dense formulas in float64.

Runs on a CUDA device or, where there is none, in Triton's interpreter on the CPU (tests/conftest.py), which is slow: sizes are
small, but odd.

Tolerances are relative to the norm of what is compared: 1e-5 is some hundred roundings of a float32, about what sums of a few
thousand terms lose; no pre-activation lies so near to a border that rounding decides, which the counts of pairs show.
"""

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

from everyscope.sae.kernels import gpu_sums, gpu_update
from everyscope.sae.trainable import TENSORS, TrainableSae, catch_up, dense_update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS, reason=REASON)]
if RUNS:
    from everyscope.sae import pairs_gpu
    from everyscope.sae.pairs_gpu import LAG, GpuPairs


def by_pairs(*saes: TrainableSae, max_pairs: int | None = None) -> "GpuPairs":
    """An engine past its dense beginning."""
    engine = GpuPairs(saes, max_pairs)
    engine.tensors()["uses_pairs"].fill_(True)
    return engine


def assert_step_equals_oracle(sae: TrainableSae, x: torch.Tensor, y: torch.Tensor | None = None) -> TrainableSae:
    """One step by pairs and densely in float64: all gradients (which the fresh means of their squares show), all parameters."""
    ours, oracle = moved(sae, DEVICE, torch.float32), moved(sae, DEVICE, torch.float64)
    (losses,) = by_pairs(ours, max_pairs=x.shape[0] * sae.config.width).step(x, 0, 10, y)
    want = dense_update(oracle, x.double(), 0, 10, None if y is None else y.double())
    assert float(losses.l0) == pytest.approx(float(want.l0), rel=1e-6)
    assert float(losses.pairs) == pytest.approx(float(want.pairs), rel=1e-6)
    assert float(losses.reconstruction) == pytest.approx(float(want.reconstruction), rel=1e-5)
    for name in sae.parameters:
        assert_near(ours.squared[name].sqrt(), oracle.squared[name].sqrt(), what=f"gradient of {name}")
        change = [new.parameters[name].double() - sae.parameters[name].double() for new in (ours, oracle)]
        # A change is what is left of two float32 parameters: it shows their own rounding, some 1e-7 of them.
        rounding = 1e-6 * sae.parameters[name].double().norm() / change[1].norm().clamp(min=1e-30)
        assert_near(*change, tolerance=1e-5 + float(rounding), what=f"change of {name}")
    return ours


@pytest.mark.parametrize(
    ("rows", "d_in", "width", "preset"),
    [
        *((37, 40, 67, RECIPE), (33, 24, 50, NESTED), (5, 2304, 9, RECIPE), (4, 3584, 7, NESTED), (1, 3, 2, RECIPE)),
        *((37, 40, 67, BY_ROW), (5, 2304, 9, BY_ROW)),
    ],
)
def test_a_step_equals_the_float64_oracle(rows, d_in, width, preset):
    sae, x = problem(rows, d_in, width, preset)
    ours = assert_step_equals_oracle(sae, x)
    norms = ours.parameters["W_dec"].norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("rows", "d_in", "width", "preset"), [(37, 40, 67, RECIPE), (33, 24, 50, NESTED), (37, 40, 67, BY_ROW), (5, 20, 30, RECIPE)]
)
def test_a_step_of_a_transcoder_equals_the_float64_oracle(rows, d_in, width, preset, skip):
    sae, x, y = transcoder_problem(rows, d_in, width, preset, skip=skip)
    before = {name: tensor.clone() for name, tensor in sae.parameters.items()}
    ours = assert_step_equals_oracle(sae, x, y)
    assert all((ours.parameters[name] != tensor).any() for name, tensor in before.items())


def test_a_target_that_is_the_input_is_an_sae_to_the_bit():
    saes = [problem(1, 20, 45, BY_ROW)[0] for _ in range(2)]
    engines = [by_pairs(sae, max_pairs=12 * 45) for sae in saes]
    for step, x in enumerate(batches(saes[0], 3)):
        engines[0].step(x, step, 3)
        engines[1].step(x, step, 3, x.clone())
    assert all(torch.equal(tensor, saes[1].tensors()[name]) for name, tensor in saes[0].tensors().items())


def test_rows_without_pairs_and_latents_that_always_fire_or_never(monkeypatch):
    monkeypatch.setattr(gpu_sums, "SEGMENT", 8)
    monkeypatch.setattr(gpu_update, "SEGMENT", 8)  # so that a latent of 37 pairs has five of them
    monkeypatch.setattr(pairs_gpu, "SEGMENT", 8)
    sae, x = problem(37, 24, 41, NESTED)
    sae.parameters["b_enc"][[3, 17]] = 2.0
    sae.parameters["b_enc"][[0, 40]] = -9.0
    assert_step_equals_oracle(sae, x)
    sae.parameters["b_enc"][[3, 17]] = 0.0
    x[4:9] = sae.parameters["b_dec"]
    ours = assert_step_equals_oracle(sae, x)
    for name in ("W_enc", "W_dec"):
        rows = [each.parameters[name].T if name == "W_enc" else each.parameters[name] for each in (ours, sae)]
        assert torch.equal(rows[0][[0, 40]], rows[1][[0, 40]])
    assert ours.touched[[0, 40]].tolist() == [0, 0]


def test_rows_of_huge_norm():
    sae, x = problem(19, 40, 31)
    x[[2, 11]] *= 1e4
    assert_step_equals_oracle(sae, x)


def test_no_pair_at_the_border_is_lost():
    """Thresholds put, latent by latent, so that one row's pre-activation lies just inside the near window."""
    sae, x = problem(23, 2304, 40)
    sae.parameters["b_dec"].zero_()
    x[5] *= 1e3
    # The worst for bfloat16: every entry of this row and this latent is rounded down by nearly half of its last place.
    x[0], sae.parameters["W_enc"][:, 0] = 2**-2 * (1 + 0.98 / 256), 2**-6 * (1 + 0.98 / 256)
    x[0, 0] = 2.171875  # makes the product of the rounded ones 9.03, which is rounded to 9
    p, half = {name: t.double() for name, t in sae.parameters.items()}, RECIPE.bandwidth / 2
    pre = (x.double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    rows = torch.arange(40, device=DEVICE) % 23
    at_border = pre[rows, torch.arange(40, device=DEVICE)]
    # Below the border by more than float32 can be wrong about it, far less than bfloat16 is.
    room = 1e-6 * (x.double().norm(dim=1)[rows] * p["W_enc"].norm(dim=0) + 1)
    sae.parameters["threshold"].copy_((at_border + half - room).float())
    engine = by_pairs(sae, max_pairs=23 * 40)
    buffers = engine._buffers_for(23, 2304, (40,))
    count, fits = buffers.find_pairs(x, sae, engine._screened[0])
    assert fits
    listed = torch.zeros(23, 40, dtype=torch.bool, device=DEVICE)
    listed[buffers.lists.row[:count].long(), buffers.lists.latent[:count].long()] = True
    inside = pre > sae.parameters["threshold"].double() - half
    assert inside[rows, torch.arange(40, device=DEVICE)].all()
    assert not (inside & ~listed).any()
    # What is let through without need is near: both roundings at their worst, once in the product and once in its margin.
    worst = 0.02 * x.norm(dim=1, keepdim=True) * p["W_enc"].norm(dim=0)
    assert not (listed & (pre < sae.parameters["threshold"].double() - half - worst)).any()
    by_latent = pre.T[listed.T]  # in the lists' order: latents ascending, and rows within each
    assert (buffers.lists.pre[:count] - by_latent).abs().max() < 1e-6 * x.norm(dim=1).max() * p["W_enc"].norm(dim=0).max()
    assert torch.equal(buffers.latent[:count].long(), listed.nonzero()[:, 1])
    assert torch.equal(buffers.lists.row[:count].long(), listed.T.nonzero()[:, 1])
    assert_near(buffers.pre_by_row[:count], pre[listed], 1e-6)


def assert_screen_is_of_the_parameters(engine: "GpuPairs") -> None:
    for screened in engine._screened:
        rounded, norms, residuals = (part.clone() for part in screened.parts)
        screened.refresh()
        assert torch.equal(rounded, screened.parts[0])
        # Summed by another kernel, in another order.
        assert torch.allclose(norms, screened.norms, rtol=1e-5)
        assert torch.allclose(residuals, screened.residuals, rtol=1e-5)


@pytest.mark.parametrize("preset", [RECIPE, BY_ROW])
def test_lazy_decay_equals_dense_steps(preset):
    sae, _ = problem(1, 20, 45, preset)
    oracle = moved(sae, DEVICE, torch.float64)
    engine = by_pairs(sae, max_pairs=12 * 45)
    for step, x in enumerate(batches(sae, 5)):
        engine.step(x, step, 5)
        dense_update(oracle, x.double(), step, 5)
    assert sae.touched.unique().numel() > 2  # latents were left alone, for different times
    assert_screen_is_of_the_parameters(engine)
    catch_up(sae, 5)
    for name in TENSORS:
        # Steps add up their roundings, and a threshold's gradient divides by the bandwidth.
        assert_near(sae.parameters[name], oracle.parameters[name], 1e-5, name)
        assert_near(sae.squared[name], oracle.squared[name], 1e-4, name)


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_does_not_fit_changes_nothing(skip):
    sae, x, y = transcoder_problem(12, 20, 45, skip=True) if skip else (*problem(12, 20, 45), None)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    engine = by_pairs(sae, max_pairs=7)
    (losses,) = engine.step(x, 0, 5, y)
    assert all(torch.equal(sae.tensors()[name], tensor) for name, tensor in before.items())
    assert engine.tensors()["skipped"].tolist() == [1]
    assert float(losses.pairs) * 12 > 7
    assert engine.tensors()["counts"][0].item() > 7
    x[3, 3] = torch.nan
    assert engine.step(x, 1, 5, y)[0].reconstruction.isnan()


def test_what_is_not_a_number_is_noticed():
    sae, x = problem(6, 20, 11)
    x[2, 5] = torch.nan
    (losses,) = by_pairs(sae, max_pairs=66).step(x, 0, 5)
    assert losses.reconstruction.isnan()


def test_two_runs_give_the_same_bits_also_from_a_checkpoint_and_with_many_saes():
    ends = []
    for broken in (False, True):
        saes = [problem(1, 20, width, preset)[0] for width, preset in ((23, RECIPE), (15, NESTED), (23, BY_ROW))]
        engine = by_pairs(*saes)
        for step, x in enumerate(batches(saes[0], 3)):
            if broken and step == 2:
                saes = [moved(sae, DEVICE, torch.float32) for sae in saes]
                fresh = GpuPairs(saes)
                for name, tensor in engine.tensors().items():
                    fresh.tensors()[name].copy_(tensor)
                engine = fresh
            losses = engine.step(x, step, 3)
        ends.append([*(t for sae in saes for t in sae.tensors().values()), *(loss.reconstruction for loss in losses)])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_the_way_is_chosen_by_an_old_count(monkeypatch):
    monkeypatch.setattr(pairs_gpu, "DENSE_SHARE", 0.4)
    monkeypatch.setattr(pairs_gpu, "PAIRS_SHARE", 0.3)
    sae, _ = problem(1, 12, 20)
    oracle = moved(sae, DEVICE, torch.float64)
    engine = GpuPairs([sae], max_pairs=12 * 20)
    ways = []
    for step, x in enumerate(batches(sae, LAG + 3)):
        if step == LAG + 1:
            engine.tensors()["counts"][(step + 1) % LAG] = 12 * 20  # as if all had been pairs, LAG steps before the last
        engine.step(x, step, 20)
        dense_update(oracle, x.double(), step, 20)
        if engine.tensors()["uses_pairs"]:
            assert_screen_is_of_the_parameters(engine)
        ways.append(bool(engine.tensors()["uses_pairs"]))
    assert ways == [False] * LAG + [True, True, False]
    for name in TENSORS:
        assert_near(sae.parameters[name], oracle.parameters[name], 1e-5, name)
        assert_near(sae.squared[name], oracle.squared[name], 1e-4, name)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    sae, x = problem(256, 128, 1000)
    engine = by_pairs(sae)
    engine.step(x, 0, 5)  # compiles, and makes its buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(x, 1, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
