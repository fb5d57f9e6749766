"""One shard: a file in the safetensors layout whose place for every row is known before the first one is written.

The public `safetensors` package opens it. We read it by mapping, because that is several times faster than the package's slices.
The header is padded with spaces to 4 KiB. The
int32 tensors lie before `activations`, so that an odd number of bfloat16 values misaligns nothing.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from everyscope.base.errors import DamagedData
from everyscope.base.files import reserve
from everyscope.base.tensors import tensors_header

RowDtype = Literal["float32", "bfloat16"]
"""Number formats in which activations are stored."""
TensorDtype = Literal["float32", "bfloat16", "int32"]
"""Number formats of any tensor in a shard."""
HEADER_ALIGNMENT = 4096
"""The header's length is a multiple of this [bytes]."""
CARRIER = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "int32": np.dtype("<i4")}
"""The numpy type in which a tensor's bytes are handled; numpy has no bfloat16, so its bits travel as uint16."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard."""

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor [bytes]."""
        return math.prod(self.shape) * CARRIER[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of a shard in the order in which they lie in the file."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes: the header's length, then JSON padded with spaces."""
        return tensors_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors), alignment=HEADER_ALIGNMENT)

    @cached_property
    def body_bytes(self) -> dict[str, int]:
        """Where in the file each tensor begins [bytes]."""
        sizes = [tensor.num_bytes for tensor in self.tensors]
        starts = accumulate(sizes[:-1], initial=len(self.header))
        return {tensor.name: start for tensor, start in zip(self.tensors, starts, strict=True)}

    @property
    def num_bytes(self) -> int:
        """Size of the whole file [bytes]."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)

    def views(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Each tensor, in its carrier type, as a window on the file's bytes `raw` (uint8 [bytes])."""
        found = {}
        for tensor in self.tensors:
            start = self.body_bytes[tensor.name]
            found[tensor.name] = raw[start : start + tensor.num_bytes].view(CARRIER[tensor.dtype]).reshape(tensor.shape)
        return found

    def byte_range(self, name: str, first: int, last: int) -> tuple[int, int]:
        """Where rows `first` to `last` (excluded) of tensor `name` lie in the file: [start, stop) in bytes."""
        start, row_bytes = self.body_bytes[name], self.row_bytes(name)
        return start + first * row_bytes, start + last * row_bytes

    def row_bytes(self, name: str) -> int:
        """Size of one row of tensor `name` [bytes]."""
        return next(tensor.num_bytes // tensor.shape[0] for tensor in self.tensors if tensor.name == name)


def layout_of(rows: int, d_in: int, dtype: TensorDtype) -> Layout:
    """The layout of a shard of activations, or of tokens, which are int32."""
    return token_layout(rows, d_in) if dtype == "int32" else activation_layout(rows, d_in, dtype)


def activation_layout(rows: int, d_in: int, dtype: RowDtype) -> Layout:
    """`sequence` and `position` int32 [rows], `activations` [rows, d_in]."""
    return Layout(
        (
            TensorSpec("sequence", "int32", (rows,)),
            TensorSpec("position", "int32", (rows,)),
            TensorSpec("activations", dtype, (rows, d_in)),
        )
    )


def token_layout(blocks: int, context: int) -> Layout:
    """`input_ids` int32 [blocks, ctx]."""
    return Layout((TensorSpec("input_ids", "int32", (blocks, context)),))


def reserve_shard(path: Path, layout: Layout) -> None:
    """A new file of full size with its header written, and its room on the disk taken; OSError where there is none."""
    with path.open("wb") as file:
        file.write(layout.header)
        reserve(file, layout.num_bytes)


def create_shard(path: Path, layout: Layout) -> np.ndarray:
    """`reserve_shard`, and the file mapped for writing as uint8 [bytes]."""
    reserve_shard(path, layout)
    return np.memmap(path, dtype=np.uint8, mode="r+")


def open_shard(path: Path, layout: Layout) -> np.ndarray:
    """The file mapped for reading as uint8 [bytes]; DamagedData where its size or header is not that of `layout`.

    No MADV_SEQUENTIAL: that advice made cold reads twenty times slower when it was measured.
    """
    if not path.is_file():
        raise DamagedData(f"{path}: the shard is missing; run the same harvest again, which rewrites it")
    got = path.stat().st_size
    if got != layout.num_bytes:
        raise DamagedData(f"{path}: holds {got} bytes, expected {layout.num_bytes}; run the same harvest again with --repair")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    header = layout.header
    if raw[: len(header)].tobytes() != header:
        raise DamagedData(f"{path}: its header is not the one written; run the same harvest again with --repair")
    return raw
