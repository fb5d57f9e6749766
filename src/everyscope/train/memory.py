"""What training takes of each device's memory, before anything is allocated. Torch-free.

Bytes are counted off the engines (sae/trainable.py, sae/pairs_gpu.py) and hold to the byte; tests compare them with the engines'
own tensors. Both ask here: a run, which splits groups of SAEs until they fit, and a plan, which says what a run will do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from everyscope.sae.config import SaeConfig
from everyscope.sae.gpu_limits import ROUNDED_SEGMENT, SEGMENT, list_room, rounded_list_room, steps_apart
from everyscope.train.config import TrainConfig, TrainSettings

USABLE = 0.9
"""Share of a GPU's memory that training may take; the rest is the driver's, the compiler's, and lost between allocations [1]."""
MOST_PROGRAMS = 160 * 32
"""Programs that share an update, at most: 32 on each SM of the largest GPU."""
CONTEXT_BYTES = 1 << 30
"""What a process takes of a GPU before it holds a tensor [bytes]."""


@dataclass(frozen=True)
class DevicePart:
    """One device's part of one SAE: all of it, or some of its latents (shards) on some rows of each batch (replicas)."""

    rows: int
    """Rows of a batch on this device [rows]."""
    d_in: int
    width: int
    """Latents on this device [latents]."""
    prefixes: int = 1
    """Matryoshka prefixes that reconstruct alone."""

    @classmethod
    def of(cls, d_in: int, width: int, batch_rows: int, shards: int = 1, replicas: int = 1, prefixes: int = 1) -> "DevicePart":
        """The largest part where an SAE's latents and a batch's rows are dealt out evenly."""
        return cls(math.ceil(batch_rows / replicas), d_in, math.ceil(width / shards), prefixes)


def state_bytes(d_in: int, width: int) -> int:
    """An SAE in training: five float32 parameters and their mean squares, weights of coordinates, two counts a latent [bytes]."""
    return 2 * 4 * (2 * d_in * width + 2 * width + d_in) + 4 * d_in + 2 * 4 * width


def screen_bytes(d_in: int, width: int) -> int:
    """What the GPU engine keeps of each SAE besides: W_enc in bfloat16, with two bounds for each latent [bytes]."""
    return 2 * d_in * width + 2 * 4 * width


def pairs_bytes(part: DevicePart) -> int:
    """Memory for one step by pairs, shared by SAEs of equal shapes: `Buffers` of sae/pairs_gpu.py [bytes]."""
    rows, d_in, width = part.rows, part.d_in, part.width
    room = list_room(rows, width)
    centred = rows * (4 * d_in + 2 * d_in + 8)
    marks = 4 * (rows * math.ceil(width / 32) + width * math.ceil(rows / 32))
    lists = 8 * (rows + 1) + 8 * (width + 1) + room * 7 * 4
    errors = 4 * part.prefixes * rows * d_in + 8 * part.prefixes
    return centred + marks + lists + errors + math.ceil(room / SEGMENT) * 2 * d_in * 4


def rounded_bytes(d_in: int, width: int) -> int:
    """What the bfloat16 engine keeps of each SAE besides: both weights rounded, three counts a latent [bytes]."""
    return 2 * 2 * d_in * width + 3 * 4 * width


def rounded_work_bytes(part: DevicePart, programs: int) -> int:
    """Memory for one step in bfloat16, shared by SAEs of equal shapes: `Work` of sae/gpu_work.py after a dense step [bytes].

    `programs` share the latents of an update.
    """
    rows, d_in, width = part.rows, part.d_in, part.width
    room = rounded_list_room(rows, width)
    products = 2 * rows * d_in + 3 * 2 * rows * width  # x, the product, activations and their derivative
    errors = (4 + 2) * part.prefixes * rows * d_in + 8 * part.prefixes
    marks = 4 * (rows * math.ceil(width / 32) + width * math.ceil(rows / 32))
    lists = 8 * (rows + 1) + 4 * 8 * (width + 1) + room * 2 * (4 + 4)
    sums = (math.ceil(room / ROUNDED_SEGMENT) + width) * (2 * d_in + 2) * 4
    return products + errors + marks + lists + sums + 4 * d_in * min(width, programs)


def dense_bytes(part: DevicePart, is_shared: bool = False) -> int:
    """Memory for one dense step, freed behind it: at most what gradients and Adam hold at once, uncompiled [bytes].

    While gradients are made: five arrays [rows, latents] and a weight's gradient, or four and both; ranks that share the SAE hold
    five and both; beside them the reconstruction's errors, which ranks hold once more to sum them. While Adam moves W_dec: four
    arrays of a weight's size.
    """
    numbers, weight = part.rows * part.width, part.d_in * part.width
    gradients = 5 * numbers + 2 * weight if is_shared else max(5 * numbers + weight, 4 * numbers + 2 * weight)
    errors = (3 + 2 * part.prefixes) * part.rows * part.d_in
    return 4 * (max(gradients + errors, 4 * weight) + 16 * (part.width + part.d_in))


def batch_bytes(rows: int, d_in: int) -> int:
    """The batch in use as it came and normalised, and those under way to a GPU (train/feed.py), float32 [bytes]."""
    return 5 * 4 * rows * d_in


def parts_of(saes: Sequence[SaeConfig], d_in: int, settings: TrainSettings) -> list[DevicePart]:
    """Each SAE's part on one device."""
    return [
        DevicePart.of(d_in, sae.width, settings.batch_rows, settings.shards, settings.replicas, len(sae.prefixes)) for sae in saes
    ]


def group_bytes(saes: Sequence[SaeConfig], d_in: int, settings: TrainSettings) -> int:
    """On each device, for SAEs that train together: state, work space of every shape, the largest dense step, batches [bytes]."""
    parts = parts_of(saes, d_in, settings)
    shapes = set(parts)
    if settings.products == "bfloat16":
        stays = sum(state_bytes(d_in, part.width) + rounded_bytes(d_in, part.width) for part in parts)
        passing = max(4 * 4 * part.rows * d_in + 16 * part.rows * part.width // 32 for part in shapes)
        are_apart = settings.ranks == 1 and all(steps_apart(part.rows, part.width) for part in parts)
        work = sum(rounded_work_bytes(part, MOST_PROGRAMS) for part in (parts if are_apart else shapes))
        return stays + work + passing + batch_bytes(parts[0].rows, d_in)
    stays = sum(state_bytes(d_in, part.width) + screen_bytes(d_in, part.width) for part in parts)
    dense = max(dense_bytes(part, is_shared=settings.ranks > 1) for part in shapes)  # has room for a step by pairs' gradients
    return stays + sum(pairs_bytes(part) for part in shapes) + dense + batch_bytes(parts[0].rows, d_in)


def bytes_of(config: TrainConfig, d_in: int) -> int:
    """Memory that a training group takes of each of its devices, for activations of size `d_in` [bytes]."""
    return group_bytes(config.saes, d_in, config.settings)
