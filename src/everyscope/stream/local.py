"""Sources on this machine: the shards of a folder, and arrays in memory."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from everyscope.base.errors import DataError, NonFinite, ShapeMismatch
from everyscope.base.ids import content_id
from everyscope.shards.order import permutation
from everyscope.shards.reader import Shards

CHUNK_ROWS = 4096
"""Rows of an array that are widened to float64 at a time [rows]."""


def spans(step: int, rows: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """The stretches [start, stop) of a table of `num_rows` that make up batch `step`, wrapping around as often as needed."""
    assert min(step + 1, rows, num_rows) > 0, f"step={step}, rows={rows}, num_rows={num_rows}"
    start = step * rows % num_rows
    while rows:
        stop = min(start + rows, num_rows)
        yield start, stop
        rows -= stop - start
        start = 0


class LocalSource:
    """The shards of one site. They were shuffled when written, so reading them in order is reading at random."""

    def __init__(self, folder: Path) -> None:
        """Open a finished site folder; DataError where it has not been finished."""
        self.shards = Shards(folder)
        self.d_in, self.num_rows = self.shards.d_in, self.shards.num_rows
        self.scale, self.identity = self.shards.statistics.scale, self.shards.identity

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32; DamagedData, naming the shard, where its bytes differ from their checksum."""
        parts = [self.shards.rows(start, stop) for start, stop in spans(step, rows, self.num_rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


class ArraySource:
    """An array of activations from anywhere, shuffled once."""

    def __init__(self, activations: Float[np.ndarray, "rows d_in"] | Float[Tensor, "rows d_in"], seed: int = 0) -> None:
        """Take `activations` as they are, without a copy; do not change them afterwards.

        ShapeMismatch where they are not [rows, d_in] with at least one of each, DataError where they are no floating-point
        numbers, NonFinite, naming the first such row, where one is NaN or infinite.
        """
        table = torch.from_numpy(activations) if isinstance(activations, np.ndarray) else activations.detach().cpu()
        if table.ndim != 2 or 0 in table.shape:
            raise ShapeMismatch(
                f"activations have shape {tuple(table.shape)}, expected [rows, d_in] with at least one row; reshape them"
            )
        if not table.is_floating_point():
            raise DataError(f"activations are {table.dtype}, expected floating-point numbers; convert them to float32")
        self._table, self._order = table, torch.from_numpy(permutation(len(table), seed))
        self.num_rows, self.d_in = table.shape
        self.scale, checksum = _measure(table)
        self.identity = content_id({"shape": list(table.shape), "seed": seed, "float32": checksum})

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32."""
        order = torch.cat([self._order[start:stop] for start, stop in spans(step, rows, self.num_rows)])
        return self._table[order].float()


def _measure(table: Float[Tensor, "rows d_in"]) -> tuple[float, str]:
    """The root mean squared norm in float64, and a checksum of the rows as float32."""
    squares, checksum = 0.0, xxhash.xxh3_128()
    for start in range(0, len(table), CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS].float().contiguous()
        norms = chunk.double().square().sum(1)
        if not norms.isfinite().all():
            row = start + int(norms.isfinite().long().argmin())
            raise NonFinite(f"activations row {row} holds NaN or infinity (or overflows float32); drop or mend such rows")
        squares += float(norms.sum())
        checksum.update(chunk.numpy().data)
    return math.sqrt(squares / len(table)), checksum.hexdigest()
