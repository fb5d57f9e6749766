"""Tensors on disk in the safetensors layout, which the public `safetensors` package reads.

We write it ourselves: the package's `save_file` (0.8) writes to a file of a random name beside the one asked for, which a killed
process leaves behind for ever, and wants every tensor in the host's memory at once. The format: the header's length as a
little-endian uint64, the header as JSON padded with spaces, then the tensors' bytes, row-major and little-endian.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError, safe_open

from everyscope.base.errors import DamagedData
from everyscope.base.files import require_file, unreadable, whole_file

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
CHECKSUM, UNSEALED = "checksum", "0" * 32
"""Key in the metadata of a sealed file: xxh3-128 of the whole file, with this in the checksum's place."""
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows a header [bytes]."""
CHUNK_BYTES = 1 << 24


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


def write_tensors(
    path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None, *, is_sealed: bool = False
) -> None:
    """Write `tensors`, from any device and one at a time, whole or not at all; equal tensors give equal bytes.

    Wide numbers come first, then by name, so that every tensor is aligned. No bfloat16: numpy, through which they go, has none.
    A file that `is_sealed` holds its own checksum, which `opened_tensors` compares.
    """

    def described(name: str) -> tuple[str, str, tuple[int, ...]]:
        return name, str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape)

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    fields, digest = dict(metadata or {}), xxhash.xxh3_128()
    if is_sealed:
        fields[CHECKSUM] = UNSEALED
    with whole_file(path) as partial, partial.open("wb") as file:
        header = tensors_header(map(described, order), fields)
        digest.update(header)
        file.write(header)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().numpy().reshape(-1).data
            if is_sealed:
                digest.update(data)
            file.write(data)
        if is_sealed:
            file.seek(0)
            file.write(header.replace(UNSEALED.encode(), digest.hexdigest().encode(), 1))


@contextmanager
def opened_tensors(
    path: Path, framework: str = "pt", *, is_checked: bool = True, remedy: str = "delete it and run the same command again"
) -> Iterator[Any]:
    """A sealed file as `safetensors.safe_open` gives it, once its bytes agree with its checksum (or unchecked).

    DamagedData, which names the file and ends with `remedy`, where they do not, or where what is asked of the file within the
    block is not in it; DataError where it is missing.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            got, want = _sealed_checksums(file, path.stat().st_size) if is_checked else ("", "")
        opened = safe_open(path, framework)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise unreadable(path, "safetensors", error, remedy) from error
    if got != want:
        raise DamagedData(f"{path}: its checksum is {got[:12]}…, expected {str(want)[:12]}…; {remedy}")
    with opened:
        try:
            yield opened
        except SafetensorError as error:
            raise unreadable(path, "the tensors expected", error, remedy) from error


def _sealed_checksums(file: IO[bytes], num_bytes: int) -> tuple[str, str | None]:
    """The checksum of an open file, and the one that it holds; ValueError where it has no header."""
    header, stop = _header(file, num_bytes)
    want = (header.get("__metadata__") or {}).get(CHECKSUM)
    file.seek(0)
    raw = file.read(stop)
    digest = xxhash.xxh3_128(raw if not isinstance(want, str) else raw.replace(want.encode(), UNSEALED.encode(), 1))
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest(), want


def _header(file: IO[bytes], num_bytes: int) -> tuple[dict[str, Any], int]:
    """The header of an open file, and where its data begin; ValueError where it has none."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
        raise ValueError(f"the header would have {length} bytes in a file of {num_bytes}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header, 8 + length


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, without its data; DataError where `path` is none."""
    require_file(path)
    try:
        with path.open("rb") as file:
            return _header(file, path.stat().st_size)[0]
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, "safetensors", error) from error
