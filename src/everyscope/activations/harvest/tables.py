"""Activations in other people's files, read in order and by pieces: .npy, .safetensors, and SAELens' cached activations.

Whatever the file, a table is [sequences, positions, d_in]; an array of two dimensions has one position a sequence. SAELens
caches are folders that Hugging Face's `datasets` saved: Arrow streams, whose order state.json tells, with a column of
activations, named after the hook, and one of token ids.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everyscope.activations.harvest.config import ImportConfig
from everyscope.base.errors import ConfigError, DataError, ShapeMismatch, first_line
from everyscope.base.files import read_json
from everyscope.base.fingerprint import fingerprint

CHUNK_BYTES = 64 << 20
"""A piece of a table, as float32 [bytes]."""
FLOATS = ("F16", "BF16", "F32", "F64")
"""The number formats of .safetensors that are activations."""
TOKEN_COLUMN = "token_ids"
"""The column of a SAELens cache that holds no activations."""


@dataclass(frozen=True)
class ActivationTable:
    """Activations to import."""

    num_sequences: int
    """Sequences, or rows where sequences are unknown [sequences]."""
    positions: int
    """Positions of each sequence [tokens]."""
    d_in: int
    """Size of the activations."""
    identity: str
    """A fingerprint of the files."""
    chunks: Callable[[int], Iterator[Float[Tensor, "sequences positions d_in"]]]
    """All of it in order, at most `count` sequences at a time; may be called again."""

    @property
    def chunk_sequences(self) -> int:
        """Sequences that make a piece of about `CHUNK_BYTES`."""
        return max(1, CHUNK_BYTES // (4 * self.positions * self.d_in))


def open_table(config: ImportConfig) -> ActivationTable:
    """The table that `config.source` holds; DataError, ShapeMismatch, ConfigError where it holds none, or several."""
    source = config.source
    if source.is_dir():
        return _arrow(source, config.tensor)
    if not source.is_file():
        raise DataError(f"{source}: no such file; give a .npy or .safetensors file, or a folder of SAELens' cached activations")
    if source.suffix == ".safetensors":
        return _safetensors(source, config.tensor)
    if config.tensor is not None:
        raise ConfigError(f"tensor={config.tensor!r}: {source.name} holds one array without a name; leave it out")
    return _npy(source)


def _npy(path: Path) -> ActivationTable:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: no .npy array ({first_line(error)}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise DataError(f"{path}: holds {getattr(array, 'dtype', 'several arrays')}, expected one of float16, float32 or float64")
    shape = _shape(path, array.shape)

    def chunks(count: int) -> Iterator[Tensor]:
        native = array.dtype.newbyteorder("=")
        for start in range(0, shape[0], count):
            yield torch.from_numpy(np.array(array[start : start + count], native, order="C")).reshape(-1, *shape[1:])

    return ActivationTable(*shape, fingerprint([path]), chunks)


def _safetensors(path: Path, name: str | None) -> ActivationTable:
    try:
        file = safe_open(path, "pt")
        names = list(file.keys())
        name = _chosen(path, "tensor", names, name)
        tensor = file.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not readable as safetensors ({first_line(error)}); write it again") from error
    if tensor.get_dtype() not in FLOATS:
        raise DataError(f"{path}: {name} is {tensor.get_dtype()}, expected {', '.join(FLOATS)}; convert it to float32")
    shape = _shape(path, tuple(tensor.get_shape()))

    def chunks(count: int) -> Iterator[Tensor]:
        for start in range(0, shape[0], count):
            yield tensor[start : min(start + count, shape[0])].reshape(-1, *shape[1:])

    return ActivationTable(*shape, fingerprint([path]), chunks)


def _arrow(folder: Path, name: str | None) -> ActivationTable:
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder}: has no state.json; give the folder that SAELens, or datasets' save_to_disk, has written")
    state = read_json(folder / "state.json")
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'}: names no data files; write the cache again") from error
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(f"{missing[0] if missing else folder}: no such file; is the cache complete?")
    schema = _stream(files[0]).schema
    name = _chosen(folder, "column", [field.name for field in schema if field.name != TOKEN_COLUMN], name)
    shapes = [_column(path, batch, name) for path in files for batch in _stream(path) if batch.num_rows]
    if len({shape.shape[1:] for shape in shapes}) != 1:
        raise ShapeMismatch(f"{folder}: sequences of {len({s.shape[1:] for s in shapes})} shapes in {name}; expected one")
    positions, d_in = shapes[0].shape[1:]

    def chunks(count: int) -> Iterator[Tensor]:
        for path in files:
            for batch in _stream(path):
                for start in range(0, batch.num_rows, count):
                    yield torch.from_numpy(np.array(_column(path, batch.slice(start, count), name)))

    return ActivationTable(sum(len(shape) for shape in shapes), positions, d_in, fingerprint(files), chunks)


def _stream(path: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no Arrow stream ({first_line(error)}); write the cache again") from error


def _column(path: Path, batch: Any, name: str) -> np.ndarray:
    """The column of nested lists as a window on the mapped file, [sequences, positions, d_in]."""
    column, lengths = batch.column(name), []
    if isinstance(column, pa.ExtensionArray):  # `datasets` has been imported and has registered its Array2D with Arrow
        column = column.storage
    while pa.types.is_nested(column.type) and hasattr(column, "flatten"):
        found = column.value_lengths().unique().to_pylist()
        if len(found) != 1 or not found[0]:
            raise ShapeMismatch(f"{path}: {name} has lists of lengths {found}, None for none; expected lists of one length")
        lengths.append(found[0])
        column = column.flatten()
    if not pa.types.is_floating(column.type) or column.null_count:
        raise DataError(f"{path}: {name} holds {column.type}, expected floating-point numbers; convert them to float32")
    if len(lengths) not in (1, 2):
        raise ShapeMismatch(f"{path}: {name} is {batch.column(name).type}, expected [d_in] or [positions, d_in] a sequence")
    return column.to_numpy(zero_copy_only=True).reshape(batch.num_rows, *([1] if len(lengths) == 1 else []), *lengths)


def _chosen(path: Path, kind: str, names: list[str], wanted: str | None) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        given = f"no {kind} {wanted!r}" if wanted is not None else f"{len(names)} {kind}s"
        raise ConfigError(f"{path}: {given}; set tensor to one of {json.dumps(names)}")
    return wanted


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ShapeMismatch(
            f"{path}: has shape {shape}, expected [rows, d_in] or [sequences, positions, d_in] with at least one row; reshape it"
        )
    return shape if len(shape) == 3 else (shape[0], 1, shape[1])
