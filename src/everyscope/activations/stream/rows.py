"""A chunk's rows where they lie: in Arrow's buffers as they came from the network, or in one tensor. Copied once."""

import ctypes
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.format import CARRIER, RowDtype


class ChunkRows:
    """Rows of a chunk in the stored number format, in one or several stretches."""

    def __init__(self, parts: Sequence[Float[Tensor, "_ d_in"]]) -> None:
        """The stretches in order; never written to."""
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def copy_into(self, out: Float[Tensor, "rows d_in"], start: int) -> None:
        """Fill `out`, of any floating-point dtype, with the rows from `start` on."""
        stop = start + len(out)
        assert 0 <= start <= stop <= len(self), f"rows {start} to {stop} of {len(self)}"
        for part, first in zip(self._parts, self._starts[:-1], strict=True):
            begin, end = max(start, first), min(stop, first + len(part))
            if begin < end:
                out[begin - start : end - start].copy_(part[begin - first : end - first])


def rows_in(buffer: pa.Buffer, offset: int, rows: int, d_in: int, dtype: RowDtype) -> Float[Tensor, "rows d_in"]:
    """Arrow memory, from `offset` [bytes] on, as a tensor without a copy, which keeps it alive. Not to be written to.

    By way of ctypes: torch takes no read-only memory without a warning, and Arrow gives no other.
    """
    carrier = CARRIER[dtype]
    size = rows * d_in * carrier.itemsize
    assert offset + size <= buffer.size, f"{offset} + {size} > {buffer.size}"
    memory = (ctypes.c_char * size).from_address(buffer.address + offset)
    memory.owner = buffer  # type: ignore[attr-defined]
    tensor = torch.from_numpy(np.frombuffer(memory, carrier).reshape(rows, d_in))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
