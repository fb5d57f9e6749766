"""Sources on this machine: the shards of a folder, and arrays in memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.activations.shards.bits import TORCH_DTYPE
from everyscope.activations.shards.memory import RecycledMemory
from everyscope.activations.shards.order import permutation
from everyscope.activations.shards.reader import open_shards
from everyscope.activations.shards.statistics import Statistics, Sums
from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch
from everyscope.base.ids import content_id

READ_AHEAD_BYTES = 64 << 20
"""How far a local source reads ahead, or two batches where these are more [bytes]."""
CHUNK_ROWS = 4096
"""Rows of an array that are widened to float64 at a time [rows]."""


def spans(step: int, rows: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """The stretches [start, stop) of a table of `num_rows` that make up batch `step`, wrapping around as often as needed."""
    assert min(step + 1, rows, num_rows) > 0, f"step={step}, rows={rows}, num_rows={num_rows}"
    yield from stretches(step * rows, (step + 1) * rows, num_rows)


def stretches(first: int, last: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """The stretches [start, stop) of a table of `num_rows` behind rows `first` to `last` of its endless repetition."""
    while first < last:
        start = first % num_rows
        stop = min(start + last - first, num_rows)
        yield start, stop
        first += stop - start


class LocalSource:
    """The shards of one site. They were shuffled when written, so reading them in order is reading at random.

    Trainers on one machine that read the same folder share it in the page cache: nothing is to be started. While a batch is
    in use, a thread fetches and checks what comes behind it, so that the next one is a single pass from the mapped file into
    the batch, bfloat16 widened on the way.
    """

    def __init__(self, folder: Path | str, *, read_ahead_bytes: int = READ_AHEAD_BYTES, is_pinned: bool = False) -> None:
        """Open a finished site folder, by path or by address; DataError where it has not been finished.

        `read_ahead_bytes` is how far reading goes ahead of batches, 0 for not at all. `is_pinned` puts batches into
        page-locked memory, from which copies to a GPU run beside its work; ConfigError where there is no GPU.
        """
        if is_pinned and not torch.cuda.is_available():
            raise ConfigError("pinned batches are for copies to a GPU, and torch finds none here; leave is_pinned out")
        self.shards = open_shards(folder)
        self.d_in, self.num_rows = self.shards.d_in, self.shards.num_rows
        self.statistics, self.identity = self.shards.statistics, self.shards.identity
        row_bytes = self.d_in * TORCH_DTYPE[self.shards.manifest.dtype].itemsize
        self._rows_ahead, self._ahead = read_ahead_bytes // row_bytes, (0, 0)
        self._is_pinned, self._memory = is_pinned, RecycledMemory()

    @property
    def row_dtype(self) -> torch.dtype:
        """What the shards hold; `batch_into` fills memory of this type without rounding."""
        return TORCH_DTYPE[self.shards.manifest.dtype]

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32; DamagedData, naming the shard, where its bytes differ from their checksum."""
        if self._is_pinned:
            batch = torch.empty(rows, self.d_in, pin_memory=True)
        else:
            memory = self._memory.take(4 * rows * self.d_in)
            batch = torch.from_numpy(memory.view(np.float32).reshape(rows, self.d_in))
        self.batch_into(step, batch)
        return batch

    def batch_into(self, step: int, batch: Float[Tensor, "rows d_in"]) -> None:
        """Fill `batch`, on the CPU and of any floating-point dtype, with batch `step` of its size. Raises as `batch` does.

        For callers who have a place for it already.
        """
        self._prepare(step * len(batch), len(batch))
        done = 0
        for start, stop in spans(step, len(batch), self.num_rows):
            self.shards.rows_into(start, stop, batch[done : done + stop - start])
            done += stop - start

    def places(self, step: int, rows: int) -> Int[Tensor, "2 rows"]:
        """Of the rows of batch `step`: the block of the harvest that each is from, and the position in it."""
        stretches = list(spans(step, rows, self.num_rows))
        sequence, position = (
            torch.cat([read(start, stop) for start, stop in stretches]) for read in (self.shards.sequence, self.shards.position)
        )
        return torch.stack([sequence, position])

    def places_identity(self) -> str:
        """`Shards.places_identity`."""
        return self.shards.places_identity()

    def _prepare(self, start: int, rows: int) -> None:
        """Read ahead from row `start` on, which counts through all epochs; in strides, for small batches ask often."""
        if not self._rows_ahead:
            return
        first, last = self._ahead
        if not first <= start <= last:  # not where reading went so far
            first = last = start
        if last - start <= max(rows, self._rows_ahead // 2):
            stop = start + min(max(2 * rows, self._rows_ahead), self.num_rows)
            for begin, end in stretches(last, stop, self.num_rows):
                self.shards.prepare(begin, end)
            last = max(last, stop)
        self._ahead = start, last


class ArraySource:
    """An array of activations from anywhere, shuffled once."""

    def __init__(self, activations: Float[np.ndarray, "rows d_in"] | Float[Tensor, "rows d_in"], seed: int = 0) -> None:
        """Take `activations` as they are, without a copy where torch can; do not change them afterwards.

        ShapeMismatch where they are not [rows, d_in] with at least one of each, DataError where they are no array of
        floating-point numbers, NonFinite, naming the first such row, where one is NaN or infinite.
        """
        table = _as_tensor(activations)
        if table.ndim != 2 or 0 in table.shape:
            raise ShapeMismatch(
                f"activations have shape {tuple(table.shape)}, expected [rows, d_in] with at least one row; reshape them"
            )
        if not table.is_floating_point():
            raise DataError(f"activations are {table.dtype}, expected floating-point numbers; convert them to float32")
        self._table, self._order = table, torch.from_numpy(permutation(len(table), seed))
        self.num_rows, self.d_in = table.shape
        self.statistics, checksum = _measure(table)
        self.identity = content_id({"shape": list(table.shape), "seed": seed, "float32": checksum})

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32."""
        order = torch.cat([self._order[start:stop] for start, stop in spans(step, rows, self.num_rows)])
        return self._table[order].float()


def _as_tensor(activations: object) -> Tensor:
    """An array as a tensor on the CPU; DataError for what is no array, or holds what torch has no numbers for."""
    if isinstance(activations, Tensor):
        return activations.detach().cpu()
    if not isinstance(activations, np.ndarray):
        kind = type(activations).__name__
        raise DataError(f"activations are a {kind}, expected a numpy array or a torch tensor; convert them with numpy.asarray")
    if activations.dtype.kind != "f" or activations.dtype.itemsize > 8:
        raise DataError(f"activations are {activations.dtype}, expected floating-point numbers; convert them to float32")
    native = activations.astype(activations.dtype.newbyteorder("="), copy=False)  # files of other machines are big-endian
    if min(native.strides, default=0) < 0 or not native.flags.writeable:  # reversed, or mapped: torch has no such tensors
        native = native.copy()
    return torch.from_numpy(native)


def _measure(table: Float[Tensor, "rows d_in"]) -> tuple[Statistics, str]:
    """Figures over all rows, each a block of its own, and a checksum of the rows as float32."""
    sums, checksum = Sums(table.shape[1], 1), xxhash.xxh3_128()
    for start in range(0, len(table), CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS].float().contiguous().numpy()
        try:
            sums.add(chunk, np.zeros(len(chunk), np.int64), np.arange(start, start + len(chunk)))
        except NonFinite as error:
            row = start + int(np.isfinite(chunk).all(1).argmin())
            raise NonFinite(
                f"activations row {row} holds NaN or infinity (or overflows float32); remove or replace such rows"
            ) from error
        checksum.update(chunk.data)
    return sums.statistics(), checksum.hexdigest()
