"""Named tensors out of files that anybody may have made, and the coder that they make: what every reader of a format shares."""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from everyscope.base.errors import DataError, ShapeMismatch, first_line
from everyscope.base.files import human_bytes, require_file, unreadable, whole_file

MAX_EXPANSION = 1.1
"""Arrays of a torch file are stored as they are: they take no more than the file, give or take its directory [1]."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; DamagedData where it is none."""
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """The dict of tensors in a file of `torch.save`, on the CPU, read by torch's loader of weights, which runs no code.

    DataError for a file of torch before 1.6 (a bare pickle), for one that asks for more than tensors, or holds no dict of them.
    """
    require_file(path)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            head = file.read(2)
        if head[:1] == b"\x80":
            raise DataError(f"{path}: is a bare pickle, as torch before 1.6 wrote; save it again with a newer torch, or as npz")
        raise unreadable(path, "a torch file", "no zip archive")
    _refuse_bomb(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors, reading it would run its maker's code; save a dict of tensors ({_cause(error)})"
        ) from error
    except Exception as error:  # of zipfile, pickle and torch's own reader: not a closed set
        raise unreadable(path, "a torch file", error) from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: holds a {type(found).__name__}, expected a dict of tensors by name")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _cause(error: UnpicklingError) -> str:
    """The line of torch's long message that names what was asked for."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), first_line(error))[:120]


def _refuse_bomb(path: Path) -> None:
    """DataError where the archive would unpack to far more than its size: torch stores tensors uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
    except Exception as error:  # zipfile raises half a dozen kinds for damaged directories
        raise unreadable(path, "a torch file", error) from error
    if size > MAX_EXPANSION * path.stat().st_size + 2**16:
        raise DataError(f"{path}: would take {human_bytes(size)}, far more than its file; it is no file of weights")


def taken(path: Path, tensors: Mapping[str, Tensor], names: Collection[str], form: str) -> tuple[Tensor, ...]:
    """The tensors of these names as float32, in order.

    ShapeMismatch where one is missing, DataError where one holds no floating-point numbers.
    """
    if missing := [name for name in names if name not in tensors]:
        held = ", ".join(sorted(tensors)[:12]) or "nothing"
        raise ShapeMismatch(f"{path}: has no tensor {missing[0]}; {form} has {', '.join(names)}, this file {held}")
    for name in names:
        if not tensors[name].is_floating_point():
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise DataError(f"{path}: {name} holds {kind}, expected floating-point numbers; convert it to float32")
    return tuple(tensors[name].float() for name in names)


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of `torch.save`, whole or not at all; equal tensors give equal bytes, for its entries carry no date."""
    with whole_file(path) as partial, partial.open("wb") as file:
        torch.save(dict(tensors), file)
