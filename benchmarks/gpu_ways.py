"""The ways to step an SAE on a GPU that benchmarks/training_gpu.py compares, how they are built, and how they are timed."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from everyscope.sae.bf16_gpu import GpuBfloat16
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.functional import unit_rows, without_parallel_part
from everyscope.sae.pairs_gpu import GpuPairs
from everyscope.sae.trainable import TENSORS, TrainableSae, new_sae

COEFFICIENT, SPREAD, MOST = 2e-3, 1.5, 0.3
"""Of sparsity; of the rates' logarithm; the highest rate."""
RECIPE = SaePreset(learning_rate=1e-6, learning_rate_warmup_steps=0, sparsity_warmup_steps=0)
STEPS = 10**6
Way = TypeVar("Way", bound=Callable[[Tensor], object])


def sae_with_l0(d_in: int, width: int, l0: float, device: str) -> TrainableSae:
    """An SAE whose latents fire on Gaussian rows of norm one, at rates that add up to `l0`."""
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=COEFFICIENT, preset=RECIPE), d_in, device)
    rates = (torch.randn(width, generator=torch.Generator().manual_seed(1)).double() * SPREAD).exp()
    rates = (rates * l0 / rates.sum()).clamp(1e-12, MOST)
    sae.parameters["threshold"].copy_(-torch.special.ndtri(rates) / d_in**0.5)
    return sae


def rows_of(batch: int, d_in: int, device: str, seed: int) -> Tensor:
    """Gaussian rows with E||x||^2 = 1."""
    return torch.randn(batch, d_in, generator=torch.Generator(device).manual_seed(seed), device=device) / d_in**0.5


def copy_of(sae: TrainableSae) -> TrainableSae:
    """The same SAE in memory of its own."""
    copies = [
        {name: t.T.clone().T if name == "W_enc" else t.clone() for name, t in d.items()} for d in (sae.parameters, sae.squared)
    ]
    return replace(sae, parameters=copies[0], squared=copies[1], touched=sae.touched.clone(), last_fired=sae.last_fired.clone())


def dense_step(p: dict[str, Tensor], v: dict[str, Tensor], x: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline, in place; the reconstruction's mean squared error and L0."""
    half = RECIPE.bandwidth / 2
    with torch.autocast(x.device.type, torch.bfloat16):
        centred = x - p["b_dec"]
        pre = centred @ p["W_enc"] + p["b_enc"]
        active = (pre > p["threshold"]).to(pre.dtype)
        near = ((pre - p["threshold"]).abs() < half).to(pre.dtype)
        f = (pre * active).bfloat16()
        error = f @ p["W_dec"] + p["b_dec"] - x
        d_x_hat = error * (2 / len(x))
        d_f = d_x_hat @ p["W_dec"].T
        d_pre = (d_f * active).bfloat16()
        d_b_enc = d_pre.sum(0, dtype=torch.float32)
        near_d_f = (d_f * near).sum(0, dtype=torch.float32)
        gradients = {
            "W_enc": (d_pre.T @ centred).T.float(),
            "W_dec": (f.T @ d_x_hat).float(),
            "b_enc": d_b_enc,
            "b_dec": d_x_hat.sum(0, dtype=torch.float32) - (p["W_enc"] @ d_b_enc).float(),
            "threshold": (p["threshold"] * near_d_f + near.sum(0, dtype=torch.float32) * (COEFFICIENT / len(x)))
            / -RECIPE.bandwidth,
        }
    gradients["W_dec"] = without_parallel_part(gradients["W_dec"], p["W_dec"])
    for name in TENSORS:
        v[name].mul_(RECIPE.beta2).addcmul_(gradients[name], gradients[name], value=1 - RECIPE.beta2)
        p[name].sub_(RECIPE.learning_rate * gradients[name] / ((v[name] * correction).sqrt() + RECIPE.epsilon))
    p["W_dec"].copy_(unit_rows(p["W_dec"]))
    p["threshold"].clamp_(min=0)
    return error.square().sum() / len(x), active.sum(dtype=torch.float32) / len(x)


class Pairs:
    """The engine, past its dense beginning."""

    def __init__(self, sae: TrainableSae, max_pairs: int | None = None) -> None:
        """For `sae`, which changes in place; lists have room for `max_pairs`, or for what the engine gives them."""
        self.sae, self.steps_done = sae, 0
        self.engine = GpuPairs([sae], max_pairs)
        self.engine.tensors()["uses_pairs"].fill_(True)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        (self.losses,) = self.engine.step(x, self.steps_done, STEPS)
        self.steps_done += 1


class Bfloat16:
    """The bfloat16 engine; the crossover that it has measured decides, until one way is `forced`."""

    def __init__(self, sae: TrainableSae, max_pairs: int | None = None, crossover: float | None = None) -> None:
        """For `sae`, which changes in place; lists have room for `max_pairs`, or for what the engine gives them."""
        self.sae, self.steps_done = sae, 0
        self.engine = GpuBfloat16([sae], max_pairs=max_pairs, crossover=crossover)

    def forced(self, by_pairs: bool) -> "Bfloat16":
        """Itself, with steps by pairs or dense ones from now on."""
        self.engine.tensors()["crossover"].fill_(1e9 if by_pairs else -1.0)
        self.engine.tensors()["uses_pairs"].fill_(by_pairs)
        return self

    def __call__(self, x: Tensor) -> None:
        """One step."""
        (self.losses,) = self.engine.step(x, self.steps_done, STEPS)
        self.steps_done += 1


class Dense:
    """The baseline."""

    def __init__(self, sae: TrainableSae, compiled: bool) -> None:
        """For `sae`, which changes in place."""
        self.sae, self.steps_done = sae, 0
        self.update = torch.compile(dense_step) if compiled else dense_step

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """One step."""
        correction = torch.full((), 1 / (1 - RECIPE.beta2 ** (self.steps_done + 1)), device=x.device)
        self.losses = self.update(self.sae.parameters, self.sae.squared, x, correction)
        self.steps_done += 1


def seconds(call: Callable[[], object], calls: int, on_cuda: bool) -> float:
    """Mean time of a call, on the device's own clock where there is one."""
    if not on_cuda:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(calls):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / calls / 1e3


def built(make: Callable[[], Way], x: Tensor, on_cuda: bool) -> tuple[Way, int] | None:
    """A way that has warmed up, and its peak memory in bytes; None where the device has not enough."""
    if not on_cuda:
        way = make()
        way(x)
        return way, 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        way = make()
        for _ in range(3):
            way(x)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        way = None
    if way is None:
        torch.cuda.empty_cache()
        return None
    return way, torch.cuda.max_memory_allocated() - before


def bytes_of(way: Pairs, batch: int, d_in: int) -> float:
    """What a step by pairs must move: the screen's factor and its bits, rows of touched latents, and gathers at pairs.

    A touched latent's rows: W_enc for pre-activations and for b_dec, W_dec for d_f, and in the update four tensors read and
    written, W_dec once more for its norm, the rounded copy. Gathers, most from the second-level cache: x where the screen let a
    pair through; W_dec, error, x and error again where it is one.
    """
    width = way.sae.config.width
    touched = float((way.sae.touched == way.steps_done).sum())
    pairs, listed = float(way.losses.pairs) * batch, float(way.engine.tensors()["counts"][(way.steps_done - 1) % 8].sum())
    return 2 * width * d_in + 6 * width * batch / 8 + touched * d_in * (3 * 4 + 10 * 4 + 2) + 4 * d_in * (listed + 4 * pairs)
