"""Tensors on disk in the safetensors layout, which the public `safetensors` package reads.

We write it ourselves: the package's `save_file` (0.8) writes to a file of a random name beside the one asked for, which a killed
process leaves behind for ever, and wants every tensor in the host's memory at once. The format: the header's length as a
little-endian uint64, the header as JSON padded with spaces, then the tensors' bytes, row-major and little-endian.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from everyscope.base.files import whole_file

if TYPE_CHECKING:
    import torch

CODES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""By a number format's name: its code in the header and its size [bytes]."""


def tensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> bytes:
    """The first bytes of a file with these (name, number format, shape) in this order; a multiple of `alignment` bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, dtype, shape in tensors:
        code, itemsize = CODES[dtype]
        stop = start + math.prod(shape) * itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, from any device and one at a time, whole or not at all; equal tensors give equal bytes.

    Wide numbers come first, then by name, so that every tensor is aligned. No bfloat16: numpy, through which they go, has none.
    """

    def described(name: str) -> tuple[str, str, tuple[int, ...]]:
        return name, str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape)

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(tensors_header(map(described, order), metadata))
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().numpy().reshape(-1).data)
