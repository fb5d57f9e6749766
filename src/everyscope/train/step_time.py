"""What one training step of one SAE takes of a device in time: bytes that pass, operations, seconds. Torch-free.

Seconds are a roofline: a step's kernels follow one another on one stream, so the times of its products, of what streams through
memory and of what is summed over links add up. How sparse a code is, and how its latents' rates differ, nobody knows before
training: the constants below are assumed, and printed beside every plan. Memory is training's own matter (train/memory.py).
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from everyscope.sae.gpu_limits import PAIRS_SHARE
from everyscope.train.config import Products
from everyscope.train.devices import Device
from everyscope.train.memory import DevicePart

MODEL_FLOP, DENSE_FLOP, SCREEN_FLOP = 12, 10, 2
"""Operations per row, input and latent: by the usual count (six a parameter), of a dense step, of the screen's one product."""
SKIP_FLOP = 4
"""Operations per row and number of a skip: what it predicts, and its gradient."""
DENSE_PASSES, STATE_PASSES = 12, 10
"""How often a dense float32 step, compiled, streams through [rows, latents], and through one weight matrix; counted."""
ROUNDED_PASSES, ROUNDED_DENSE_PASSES = 3, 9
"""How often a bfloat16 step by pairs, and a dense one, streams through [rows, latents] in two bytes each; counted."""
ROUNDED_STATE_BYTES = 8 * 4 + 2 * 2
"""What its update moves of each weight that it touches: two float32 matrices and their means read and written, and both rounded
copies written [bytes]."""
PAIRS_PER_ACTIVE, LISTED_PER_PAIR = 1.1, 1.4
"""Pairs for each active latent, for some are near their threshold, and what the screen lets through for each pair; assumed."""
RATE_SPREAD, HIGHEST_RATE = 1.5, 0.3
"""Spread of the logarithms of latents' firing rates, and the highest of them: of how many latents a batch touches; assumed."""
CACHE_SHARE = 0.5
"""Share of what is gathered at pairs that the second-level cache serves; assumed."""
DENSE_STEPS = 0.1
"""Share of a run's steps that are dense although the code ends sparse, for it does not begin so; assumed."""
ASSUMED: dict[str, Any] = {
    "pairs_per_active": PAIRS_PER_ACTIVE,
    "listed_per_pair": LISTED_PER_PAIR,
    "rate_spread": RATE_SPREAD,
    "cache_share": CACHE_SHARE,
    "dense_steps": DENSE_STEPS,
    "dense_passes": DENSE_PASSES,
    "state_passes": STATE_PASSES,
    "rounded_passes": ROUNDED_PASSES,
    "rounded_dense_passes": ROUNDED_DENSE_PASSES,
}
"""What a plan's times rest on beside the device."""


StepKind = Literal["dense", "pairs_cpu", "pairs_gpu", "bfloat16"]
"""How a step is computed, as far as ranks notice: on a GPU in bfloat16 they sum the same by pairs and densely."""


@dataclass(frozen=True)
class Load:
    """One device's part of one SAE, and how sparse its code becomes."""

    part: DevicePart
    pairs: float
    """Of one row, on this device: latents that are active or near their threshold [pairs]."""

    @classmethod
    def of(
        cls,
        d_in: int,
        width: int,
        l0: float,
        batch: int,
        shards: int = 1,
        replicas: int = 1,
        prefixes: int = 1,
        has_skip: bool = False,
    ) -> "Load":
        """The largest part where an SAE's latents and a batch's rows are dealt out evenly."""
        part = DevicePart.of(d_in, width, batch, shards, replicas, prefixes, has_skip)
        return cls(part, l0 * PAIRS_PER_ACTIVE * part.width / width)

    def step_kind(self, products: Products) -> StepKind:
        """What a GPU's engine does in that precision, once the code is as sparse as it becomes."""
        if products == "bfloat16":
            return "bfloat16"
        return "pairs_gpu" if self.pairs < PAIRS_SHARE * self.part.width else "dense"


@functools.cache
def touched_share(rate: float, rows: int) -> float:
    """Share of latents that a batch of `rows` touches where they fire at `rate` on average: log-normal rates of RATE_SPREAD [1].

    Each latent is touched with probability 1 - (1 - its rate)^rows; the mean over the distribution, at 200 quantiles.
    """
    normal, count = NormalDist(), 200
    total = 0.0
    for number in range(count):
        factor = math.exp(RATE_SPREAD * normal.inv_cdf((number + 0.5) / count) - RATE_SPREAD**2 / 2)
        total -= math.expm1(rows * math.log1p(-min(rate * factor, HIGHEST_RATE)))
    return total / count


def pairs_traffic(load: Load, touched: float, pairs: float, listed: float, cache_share: float = CACHE_SHARE) -> float:
    """Bytes that a step by pairs moves through memory, given latents touched, pairs and what the screen let through [bytes].

    The screen's factor, and its bits, written in two orders and read twice; for a touched latent three reads of a weight's row,
    four rows read and written, W_dec's again for its norm, and the rounded copy; gathers: a row of x for what is listed, and at a
    pair W_dec, the error twice, and x.
    """
    part = load.part
    bits = 6 * part.width * part.rows / 8
    rows = touched * part.d_in * (3 * 4 + 10 * 4 + 2)
    gathers = 4 * part.d_in * (listed + 4 * pairs)
    return 2 * part.width * part.d_in + bits + rows + (1 - cache_share) * gathers


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes [s]."""

    products: float = 0.0
    """Dense products."""
    traffic: float = 0.0
    """Everything else on the device, which waits for its memory."""
    latents: float = 0.0
    """The sum of partial reconstructions over latent shards."""
    gradients: float = 0.0
    """The sum of gradients over replicas."""

    @property
    def total(self) -> float:
        """The whole step [s]."""
        return self.products + self.traffic + self.latents + self.gradients

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """Products, traffic, and sums over latents and gradients [s]."""
        return self.products, self.traffic, self.latents, self.gradients

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(
            self.products + other.products,
            self.traffic + other.traffic,
            self.latents + other.latents,
            self.gradients + other.gradients,
        )

    def times(self, factor: float) -> "StepTime":
        """So many steps."""
        return StepTime(self.products * factor, self.traffic * factor, self.latents * factor, self.gradients * factor)


def compute_time(load: Load, device: Device, products: Products = "bfloat16") -> StepTime:
    """A device's own part of a step, on average over a run: nothing that goes over links."""
    return _latents_time(load, device, products) + _skip_time(load, device, products)


def _skip_time(load: Load, device: Device, products: Products) -> StepTime:
    """What a transcoder's skip adds: two products, and its state."""
    flop, numbers = SKIP_FLOP * load.part.rows * load.part.skip_numbers, load.part.skip_numbers
    if device.utilisation is not None:
        return StepTime(flop / (device.bfloat16_flops * device.utilisation))
    rate = device.bfloat16_rate if products == "bfloat16" else device.float32_rate
    return StepTime(flop / rate, 4 * STATE_PASSES * numbers / device.memory_rate)


def _latents_time(load: Load, device: Device, products: Products) -> StepTime:
    rows, d_in, width = load.part.rows, load.part.d_in, load.part.width
    if device.utilisation is not None:
        return StepTime(MODEL_FLOP * rows * d_in * width / (device.bfloat16_flops * device.utilisation))
    pairs = load.pairs * rows
    touched = width * touched_share(load.pairs / width, rows)
    screen = SCREEN_FLOP * rows * d_in * width / device.bfloat16_rate
    if products == "bfloat16":  # the engine times both ways and takes the faster
        numbers = 2 * rows * width
        gathered = 3 * 2 * d_in * pairs  # at a pair W_dec's row, x and the error
        listed = ROUNDED_PASSES * numbers + ROUNDED_STATE_BYTES * d_in * touched + (1 - CACHE_SHARE) * gathered
        dense = ROUNDED_DENSE_PASSES * numbers + ROUNDED_STATE_BYTES * d_in * width
        ways = (
            StepTime(screen, listed / device.memory_rate),
            StepTime(DENSE_FLOP * rows * d_in * width / device.bfloat16_rate, dense / device.memory_rate),
        )
        return min(ways, key=lambda way: way.total)
    passes = 4 * (DENSE_PASSES * rows * width + STATE_PASSES * 2 * d_in * width)
    dense_step = StepTime(DENSE_FLOP * rows * d_in * width / device.float32_rate, passes / device.memory_rate)
    if load.step_kind(products) == "dense":
        return dense_step
    moved = pairs_traffic(load, touched, pairs, LISTED_PER_PAIR * pairs)
    return dense_step.times(DENSE_STEPS) + StepTime(screen, moved / device.memory_rate).times(1 - DENSE_STEPS)


def summed_bytes(load: Load, shards: int, replicas: int, step_kind: StepKind, moving: int = 0) -> tuple[int, int]:
    """What a rank sums in a step over its latent shards, and over its replicas: payloads [bytes]; sae/across_ranks.py.

    Over shards the partial reconstruction of every prefix, what latents send to b_dec's gradient, and a few counts. Over replicas
    counts by latent, in float64, and gradients: of all latents, or on a CPU by pairs only of the `moving` ones.
    """
    rows, d_in, width, ranks = load.part.rows, load.part.d_in, load.part.width, shards * replicas
    kinds, numbers = {"dense": (2, ranks), "pairs_cpu": (2, 1), "pairs_gpu": (6, 1), "bfloat16": (3, 1)}[step_kind]
    gradients = {
        "dense": 2 * d_in * width + 2 * width,
        "pairs_cpu": (2 * d_in + 2) * moving,
        "pairs_gpu": 2 * d_in * width,
        "bfloat16": 2 * d_in * width + 2 * width,
    }[step_kind] + load.part.skip_numbers
    overflow = 4 if step_kind == "pairs_cpu" else 0
    to_b_dec = 0 if load.part.has_skip else 4 * d_in  # a transcoder's latents send nothing there
    over_shards = 4 * load.part.prefixes * rows * d_in + overflow + to_b_dec + 8 * (kinds + numbers)
    over_replicas = 4 * (gradients + d_in) + 8 * (kinds * width + 1 + numbers)
    return over_shards * (shards > 1), over_replicas * (replicas > 1)


def all_reduce_seconds(payload: float, devices: int, rate: float) -> float:
    """A ring over `devices` moves 2 (n - 1) / n of the payload through each link [s]; latencies are left out."""
    return 2 * (devices - 1) / devices * payload / rate


def copy_seconds(rows: int, d_in: int, device: Device) -> float:
    """A batch's rows, float32, from the host to one device [s]."""
    return 4 * rows * d_in / device.host_rate
