"""At which share of pairs a dense step becomes the faster one, measured on this device.

A step by pairs takes a time that grows with the number of pairs, a dense step does not. Both grow with the width where the share
of pairs stays, so a narrow SAE of the same d_in predicts a wide one, in little memory.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.config import SaeConfig
from everyscope.sae.trainable import StepLosses, TrainableSae, new_sae

WIDEST = 8192
"""Latents of the SAE that is timed [latents]."""
SHARES = (0.003, 0.015)
"""Active shares of all (row, latent) at which steps by pairs are timed [1]."""
CALLS, ROUNDS = 3, 5
"""Steps in a round; rounds whose median counts."""


class Stepped(Protocol):
    """An engine."""

    def step(self, x: Float[Tensor, "batch d_in"], step: int, steps: int) -> list[StepLosses]:
        """One step."""
        ...


class Maker(Protocol):
    """Makes an engine that is dense above `crossover`."""

    def __call__(self, saes: Sequence[TrainableSae], *, max_pairs: int | None, crossover: float) -> Stepped:
        """For `saes`."""
        ...


@dataclass(frozen=True)
class Timed:
    """One way at one share."""

    share: float
    """Pairs among all (row, latent) [1]."""
    seconds: float


def crossing(few: Timed, many: Timed, dense: float) -> float:
    """The share at which steps by pairs, timed at two, would take the seconds `dense`; they grow along a line."""
    slope = (many.seconds - few.seconds) / (many.share - few.share)
    if slope <= 0:  # the pairs are not what takes the time
        return 1.0 if few.seconds < dense else 0.0
    return min(1.0, max(0.0, few.share + (dense - few.seconds) / slope))


def measured_crossover(
    sae: TrainableSae, rows: int, make: Maker, clock: Callable[[Callable[[], None]], float] | None = None
) -> float:
    """The share of pairs above which dense steps are faster for SAEs like this one on batches of `rows`; some tenths of a second.

    `clock` gives the seconds that a call takes on the device.
    """
    d_in, device = len(sae.parameters["b_dec"]), sae.touched.device
    x = torch.randn(rows, d_in, generator=torch.Generator(device).manual_seed(0), device=device) / d_in**0.5
    width = min(WIDEST, sae.width)
    config = SaeConfig(width=width, sparsity_coefficient=0.0, preset=sae.config.preset.model_copy(update={"driven_share": 0.0}))
    seconds = clock or seconds_on_device

    def timed(share: float, crossover: float) -> Timed:
        scratch = new_sae(config, d_in, str(device))
        level = torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64))
        scratch.parameters["threshold"].fill_(float(level) * config.preset.encoder_scale / d_in**0.5)
        engine = make([scratch], max_pairs=rows * width // 4, crossover=crossover)
        losses: list[StepLosses] = []

        def steps() -> None:
            for _ in range(CALLS):
                losses[:] = engine.step(x, 0, 1)

        for _ in range(4):  # compiles, and comes to the way that `crossover` asks for
            steps()
        times = [seconds(steps) / CALLS for _ in range(ROUNDS)]
        return Timed(float(losses[0].pairs) / width, statistics.median(times))

    few, many = (timed(share, 1e9) for share in SHARES)
    return crossing(few, many, timed(SHARES[0], -1.0).seconds)


def seconds_on_device(call: Callable[[], None]) -> float:
    """What a call takes on the current CUDA device, by its own clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
