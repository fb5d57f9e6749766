"""What training takes of each device's memory, before anything is allocated. Torch-free.

Bytes are counted off the engines (sae/trainable.py, sae/pairs_gpu.py) and hold to the byte; tests compare them with the engines'
own tensors. Both ask here: a run, which splits groups of SAEs until they fit, and a plan, which says what a run will do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    has_skip: bool = False
    """Of a transcoder: a matrix [d_in, d_in] besides, whole on every device."""

    @classmethod
    def of(
        cls,
        d_in: int,
        width: int,
        batch_rows: int,
        shards: int = 1,
        replicas: int = 1,
        prefixes: int = 1,
        has_skip: bool = False,
    ) -> "DevicePart":
        """The largest part where an SAE's latents and a batch's rows are dealt out evenly."""
        return cls(math.ceil(batch_rows / replicas), d_in, math.ceil(width / shards), prefixes, has_skip)

    @property
    def skip_numbers(self) -> int:
        """Of its skip, if it has one [numbers]."""
        return self.d_in**2 if self.has_skip else 0


def state_bytes(part: DevicePart) -> int:
    """An SAE in training: float32 parameters and their mean squares, weights of coordinates, two counts a latent [bytes]."""
    d_in, width = part.d_in, part.width
    return 2 * 4 * (2 * d_in * width + 2 * width + d_in + part.skip_numbers) + 4 * d_in + 2 * 4 * width


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


def rounded_bytes(part: DevicePart) -> int:
    """What the bfloat16 engine keeps of each SAE besides: weights and skip rounded, three counts a latent [bytes]."""
    return 2 * 2 * part.d_in * part.width + 3 * 4 * part.width + 2 * part.skip_numbers


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
    five and both; beside them the reconstruction's errors, which ranks hold once more to sum them, and what a skip leaves of the
    target. While Adam moves W_dec: four arrays of a weight's size, while it moves a skip both gradients and four of its size.
    """
    numbers, weight, skip = part.rows * part.width, part.d_in * part.width, part.skip_numbers
    gradients = 5 * numbers + 2 * weight if is_shared else max(5 * numbers + weight, 4 * numbers + 2 * weight)
    errors = (3 + 2 * part.prefixes + part.has_skip) * part.rows * part.d_in
    moving = max(4 * weight + skip, 2 * weight + 4 * skip)
    return 4 * (max(gradients + errors + skip, moving) + 16 * (part.width + part.d_in))


def skip_step_bytes(part: DevicePart) -> int:
    """What a step's skip takes on a GPU for a moment: what it predicts and leaves, its gradient, and Adam's arrays [bytes]."""
    return 4 * (2 * part.rows * part.d_in + 6 * part.skip_numbers) if part.has_skip else 0


def batch_bytes(rows: int, d_in: int, num_sides: int = 1) -> int:
    """The batch in use as it came and normalised, and those under way to a GPU (train/feed.py), float32 [bytes].

    A transcoder's have two sides.
    """
    return 5 * 4 * rows * d_in * num_sides


def parts_of(saes: Sequence[SaeConfig], d_in: int, settings: TrainSettings) -> list[DevicePart]:
    """Each SAE's part on one device."""
    return [
        DevicePart.of(
            d_in, sae.width, settings.batch_rows, settings.latent_shards, settings.replicas, len(sae.prefixes), sae.skip
        )
        for sae in saes
    ]


def group_bytes(saes: Sequence[SaeConfig], d_in: int, settings: TrainSettings, num_sides: int = 1) -> int:
    """On each device, for SAEs that train together: state, work space of every shape, the largest dense step, batches [bytes].

    Transcoders' batches have two sides, each of size `d_in`. Work space does not depend on skips.
    """
    parts = parts_of(saes, d_in, settings)
    shapes = {replace(part, has_skip=False) for part in parts}
    batch = batch_bytes(parts[0].rows, d_in, num_sides)
    if settings.products == "bfloat16":
        stays = sum(state_bytes(part) + rounded_bytes(part) for part in parts)
        passing = max(4 * 4 * part.rows * d_in + 16 * part.rows * part.width // 32 + skip_step_bytes(part) for part in parts)
        are_apart = settings.ranks == 1 and all(steps_apart(part.rows, part.width) for part in parts)
        work = sum(rounded_work_bytes(part, MOST_PROGRAMS) for part in (parts if are_apart else shapes))
        return stays + work + passing + batch
    stays = sum(state_bytes(part) + screen_bytes(d_in, part.width) for part in parts)
    # A dense step has room for a step by pairs' gradients.
    passing = max(max(dense_bytes(part, is_shared=settings.ranks > 1), skip_step_bytes(part)) for part in parts)
    return stays + sum(pairs_bytes(part) for part in shapes) + passing + batch


def bytes_of(config: TrainConfig, d_in: int) -> int:
    """Memory that a training group takes of each of its devices, for activations of size `d_in` [bytes]."""
    return group_bytes(config.saes, d_in, config.settings, num_sides_of(config))


def num_sides_of(config: TrainConfig) -> int:
    """Sites whose rows a training group reads: one, or of transcoders two."""
    return 1 if config.writes is None else 2
