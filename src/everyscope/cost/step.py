"""What one training step of one SAE takes of a device: bytes that stay, bytes that pass, operations, seconds. Torch-free.

Bytes that stay are counted off the engine (sae/trainable.py, sae/pairs_gpu.py) and hold to the byte; tests compare them with
its tensors. Seconds are a roofline: a step's kernels follow one another on one stream, so the times of its products, of what
streams through memory and of what is summed over links add up. How sparse a code is, and how its latents' rates differ, nobody
knows before training: the constants below are assumed, and printed beside every plan.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from everyscope.cost.devices import Device

DENSE_SHARE, PAIRS_SHARE = 0.004, 0.003
"""Of all (row, latent): the GPU engine's limits for dense steps and for steps by pairs (sae/pairs_gpu.py)."""
ROOM, LEAST_ROOM, SEGMENT = 4, 4096, 512
"""Its lists' room in times the dense limit, their least room and a latent's segment [1], [pairs], [pairs]."""
MODEL_FLOP, DENSE_FLOP, SCREEN_FLOP = 12, 10, 2
"""Operations per row, input and latent: by the usual count (six a parameter), of a dense step, of the screen's one product."""
DENSE_PASSES, STATE_PASSES = 12, 10
"""How often a dense step, compiled, streams through [rows, latents] and through one weight matrix; counted, not measured."""
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
}
"""What a plan's times rest on beside the device."""


Way = Literal["dense", "pairs_cpu", "pairs_gpu"]
"""How a step is computed, as far as ranks notice."""


@dataclass(frozen=True)
class Load:
    """One device's part of one SAE: all of it, or some latents (shards) on some rows of each batch (replicas)."""

    rows: int
    """Of a batch, on this device [rows]."""
    d_in: int
    width: int
    """Latents on this device [latents]."""
    pairs: float
    """Of one row, on this device: latents that are active or near their threshold [pairs]."""
    groups: int = 1
    """Matryoshka prefixes that reconstruct alone."""

    @classmethod
    def of(cls, d_in: int, width: int, l0: float, batch: int, shards: int = 1, replicas: int = 1, groups: int = 1) -> "Load":
        """The largest part where an SAE's latents and a batch's rows are dealt out evenly."""
        latents = math.ceil(width / shards)
        return cls(math.ceil(batch / replicas), d_in, latents, l0 * PAIRS_PER_ACTIVE * latents / width, groups)

    @property
    def goes_by_pairs(self) -> bool:
        """What the GPU engine would choose, once the code is as sparse as it becomes."""
        return self.pairs < PAIRS_SHARE * self.width


def state_bytes(d_in: int, width: int) -> int:
    """An SAE in training: five float32 parameters and their mean squares, `touched` and `last_fired` [bytes]."""
    return 2 * 4 * (2 * d_in * width + 2 * width + d_in) + 2 * 4 * width


def screen_bytes(d_in: int, width: int) -> int:
    """What the GPU engine keeps of each SAE besides: W_enc in bfloat16, with two bounds for each latent [bytes]."""
    return 2 * d_in * width + 2 * 4 * width


def pairs_bytes(load: Load) -> int:
    """Memory for one step by pairs, shared by SAEs of equal shapes: `Buffers` of sae/pairs_gpu.py [bytes]."""
    rows, d_in, width, groups = load.rows, load.d_in, load.width, load.groups
    room = max(LEAST_ROOM, int(ROOM * DENSE_SHARE * rows * width))
    centred = rows * (4 * d_in + 2 * d_in + 8)
    marks = 4 * (rows * math.ceil(width / 32) + width * math.ceil(rows / 32))
    lists = 8 * (rows + 1) + 8 * (width + 1) + room * 7 * 4
    return centred + marks + lists + 4 * groups * rows * d_in + 8 * groups + math.ceil(room / SEGMENT) * 2 * d_in * 4


def dense_bytes(load: Load, is_shared: bool = False) -> int:
    """Memory for one dense step, freed behind it: at most what gradients and Adam hold at once, uncompiled [bytes].

    While gradients are made: five arrays [rows, latents] and a weight's gradient, or four and both; ranks that share the SAE hold
    five and both; beside them the reconstruction's errors, which ranks hold once more to sum them. While Adam moves W_dec: four
    arrays of a weight's size.
    """
    numbers, weight = load.rows * load.width, load.d_in * load.width
    gradients = 5 * numbers + 2 * weight if is_shared else max(5 * numbers + weight, 4 * numbers + 2 * weight)
    errors = (3 + 2 * load.groups) * load.rows * load.d_in
    return 4 * (max(gradients + errors, 4 * weight) + 16 * (load.width + load.d_in))


def batch_bytes(rows: int, d_in: int) -> int:
    """The batch in use as it came and normalised, and the next one, float32 [bytes]."""
    return 3 * 4 * rows * d_in


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
    bits = 6 * load.width * load.rows / 8
    rows = touched * load.d_in * (3 * 4 + 10 * 4 + 2)
    gathers = 4 * load.d_in * (listed + 4 * pairs)
    return 2 * load.width * load.d_in + bits + rows + (1 - cache_share) * gathers


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


def compute_time(load: Load, device: Device) -> StepTime:
    """A device's own part of a step, on average over a run: nothing that goes over links."""
    rows, d_in, width = load.rows, load.d_in, load.width
    if device.utilisation is not None:
        return StepTime(MODEL_FLOP * rows * d_in * width / (device.bfloat16_flops * device.utilisation))
    passes = 4 * (DENSE_PASSES * rows * width + STATE_PASSES * 2 * d_in * width)
    dense = StepTime(DENSE_FLOP * rows * d_in * width / device.float32_rate, passes / device.memory_rate)
    if not load.goes_by_pairs:
        return dense
    pairs = load.pairs * rows
    touched = width * touched_share(load.pairs / width, rows)
    moved = pairs_traffic(load, touched, pairs, LISTED_PER_PAIR * pairs)
    sparse = StepTime(SCREEN_FLOP * rows * d_in * width / device.bfloat16_rate, moved / device.memory_rate)
    return dense.times(DENSE_STEPS) + sparse.times(1 - DENSE_STEPS)


def summed_bytes(load: Load, shards: int, replicas: int, way: Way, moving: int = 0) -> tuple[int, int]:
    """What a rank sums in a step over its latent shards, and over its replicas: payloads [bytes]; sae/across_ranks.py.

    Over shards the partial reconstruction of every prefix, what latents send to b_dec's gradient, and a few counts. Over replicas
    counts by latent, in float64, and gradients: of all latents, or on a CPU by pairs only of the `moving` ones.
    """
    rows, d_in, width, ranks = load.rows, load.d_in, load.width, shards * replicas
    kinds, numbers = {"dense": (2, ranks), "pairs_cpu": (2, 1), "pairs_gpu": (6, 1)}[way]
    gradients = {
        "dense": 2 * d_in * width + 2 * width,
        "pairs_cpu": (2 * d_in + 2) * moving,
        "pairs_gpu": 2 * d_in * width,
    }[way]
    misfits = 4 if way == "pairs_cpu" else 0
    over_shards = 4 * load.groups * rows * d_in + misfits + 4 * d_in + 8 * (kinds + numbers)
    over_replicas = 4 * (gradients + d_in) + 8 * (kinds * width + 1 + numbers)
    return over_shards * (shards > 1), over_replicas * (replicas > 1)


def all_reduce_seconds(payload: float, devices: int, rate: float) -> float:
    """A ring over `devices` moves 2 (n - 1) / n of the payload through each link [s]; latencies are left out."""
    return 2 * (devices - 1) / devices * payload / rate


def copy_seconds(rows: int, d_in: int, device: Device) -> float:
    """A batch's rows, float32, from the host to one device [s]."""
    return 4 * rows * d_in / device.host_rate
