"""latents.parquet and explanations.parquet: some columns batch by batch for the index, and whole rows for a latent's page.

Everything is checked against the columns that a suite may have. Columns that are missing are absent from every row: a suite that
was only evaluated has the first five. A row of latents.parquet costs reading its row group, a few hundred latents; so no index
holds a copy of what is already there.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from everyscope.base.errors import DamagedData
from everyscope.base.files import unreadable
from everyscope.base.tables import UNREADABLE, opened_table, read_table

REMEDY = "download the suite again, or describe and publish it again"
BATCH = 4096
"""Rows that the index takes at a time [latents]."""
ROWS = 256
"""Rows that are unpacked for one of them, at most: the row group that describing writes [latents]."""
KEPT = 64
"""Files that are kept open [SAEs]."""

_TOKEN_VALUE = pyarrow.list_(pyarrow.struct([("token", pyarrow.int32()), ("value", pyarrow.float32())]))
COLUMNS: dict[str, pyarrow.DataType] = {
    "latent": pyarrow.int32(),
    "firings": pyarrow.int64(),
    "frequency": pyarrow.float32(),
    "mean_activation": pyarrow.float32(),
    "max_activation": pyarrow.float32(),
    "held_out_firings": pyarrow.int64(),
    "held_out_frequency": pyarrow.float32(),
    "histogram": pyarrow.list_(pyarrow.int32()),
    "quantiles": pyarrow.list_(pyarrow.float32()),
    "examples": pyarrow.list_(
        pyarrow.struct(
            [
                ("sequence", pyarrow.int32()),
                ("position", pyarrow.int32()),
                ("group", pyarrow.int8()),
                ("start", pyarrow.int32()),
                ("activations", pyarrow.list_(pyarrow.float16())),
            ]
        )
    ),
    "top_logits": _TOKEN_VALUE,
    "bottom_logits": _TOKEN_VALUE,
    "raw_top_logits": _TOKEN_VALUE,
    "raw_bottom_logits": _TOKEN_VALUE,
    "neighbours": pyarrow.list_(
        pyarrow.struct(
            [
                ("relation", pyarrow.int8()),
                ("sae", pyarrow.int32()),
                ("latent", pyarrow.int32()),
                ("cosine", pyarrow.float32()),
            ]
        )
    ),
    "cofiring": pyarrow.list_(
        pyarrow.struct([("latent", pyarrow.int32()), ("count", pyarrow.int32()), ("phi", pyarrow.float32())])
    ),
    "position_profile": pyarrow.list_(pyarrow.float32()),
    "tokens": pyarrow.list_(
        pyarrow.struct([("token", pyarrow.int32()), ("count", pyarrow.int32()), ("share", pyarrow.float32())])
    ),
    "token_entropy": pyarrow.float32(),
    "token_predictability": pyarrow.float32(),
    "token_auc": pyarrow.float32(),
}
"""Every column that is read, and as what; others are left alone."""

EXPLANATIONS: dict[str, pyarrow.DataType] = {
    "latent": pyarrow.int32(),
    "label": pyarrow.string(),
    "method": pyarrow.string(),
    "kind": pyarrow.string(),
    **{f"{score}{suffix}": pyarrow.float32() for score in ("detection", "fuzzing") for suffix in ("", "_low", "_high", "_null")},
    "num_scored": pyarrow.int32(),
}
"""The columns of explanations.parquet; a latent may have several rows, one a method."""
EMPTY_EXPLANATIONS = pyarrow.schema(list(EXPLANATIONS.items())).empty_table()


@dataclass(frozen=True)
class LatentFile:
    """An open latents.parquet."""

    path: Path
    file: pyarrow.parquet.ParquetFile
    schema: pyarrow.Schema
    """The columns that the file has, in the types of COLUMNS."""
    lock: threading.Lock
    """Arrow's readers of Parquet serve one thread at a time."""

    @property
    def facts(self) -> str:
        """What describing says of the whole file, as JSON; an empty object where it was not described."""
        return ((self.file.schema_arrow.metadata or {}).get(b"everyscope") or b"{}").decode("utf-8", "replace")

    def batches(self, wanted: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        """Its rows in order, at most BATCH at a time, with those of the `wanted` columns that it has.

        A name like examples.sequence is that field of a list of records alone. DamagedData where rows cannot be read, or hold
        what no description has.
        """
        with self.readable():
            for batch in self.file.iter_batches(BATCH, columns=self._leaves(wanted)):
                columns = [self._cast(batch, field.name) for field in batch.schema]
                yield pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)

    def row(self, latent: int, columns: Sequence[str] | None) -> dict[str, Any]:
        """One row: all columns, or those of `columns` that it has; DamagedData as `batches`."""
        names = [name for name in self.schema.names if columns is None or name in columns]
        place, group = latent, 0
        while (size := self.file.metadata.row_group(group).num_rows) <= place:
            place, group = place - size, group + 1
        with self.lock, self.readable():
            for batch in self.file.iter_batches(ROWS, row_groups=[group], columns=names, use_threads=False):
                if place < batch.num_rows:
                    return {name: self._cast(batch.slice(place, 1), name).to_pylist()[0] for name in names}
                place -= batch.num_rows
        raise DamagedData(f"{self.path}: lacks row {latent}; {REMEDY}")

    def _leaves(self, wanted: Sequence[str]) -> list[str]:
        """The paths of columns in the file: lists name their records element, item or array, as their writer likes."""
        paths = [self.file.schema.column(place).path for place in range(len(self.file.schema))]
        chosen = [(name.partition(".")[0], name.partition(".")[2]) for name in wanted]
        chosen = [(root, field) for root, field in chosen if root in self.schema.names]
        return [path for path in paths for root, field in chosen if path.split(".")[0] == root and path.endswith(field)]

    @contextmanager
    def readable(self) -> Iterator[None]:
        """DamagedData in place of what Arrow raises."""
        try:
            yield
        except UNREADABLE as error:
            raise unreadable(self.path, "Parquet", error, REMEDY) from error

    def _cast(self, batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
        column, kind = batch.column(name), COLUMNS[name]
        if pyarrow.types.is_list(kind) and pyarrow.types.is_struct(kind.value_type):  # some of its fields may have been left out
            fields = [kind.value_type.field(field.name) for field in column.type.value_type]
            kind = pyarrow.list_(pyarrow.struct(fields))
        column = column.cast(kind)
        _check(self.path, name, column)
        return column


def _check(path: Path, name: str, column: pyarrow.Array) -> None:
    """DamagedData for a null in a list, and for whole numbers below 0: they count, or name a latent, a token or a place."""
    if pyarrow.types.is_integer(column.type):
        if len(column) > column.null_count and column.drop_null().to_numpy(zero_copy_only=False).min() < 0:
            raise DamagedData(f"{path}: {name} has numbers below 0; {REMEDY}")
    elif pyarrow.types.is_list(column.type):
        items = column.flatten()
        if items.null_count:
            raise DamagedData(f"{path}: {name} has lists with nothing in a place; {REMEDY}")
        if pyarrow.types.is_struct(items.type):
            for field in items.type:
                values = items.field(field.name)
                if values.null_count and pyarrow.types.is_integer(field.type):
                    raise DamagedData(f"{path}: {name}.{field.name} is missing in places; {REMEDY}")
                _check(path, f"{name}.{field.name}", values)
        else:
            _check(path, name, items)


def open_latents(path: Path, width: int) -> LatentFile:
    """The file of an SAE of `width` latents; DamagedData where it cannot be read or has another number of rows."""
    file = opened_table(path, REMEDY)
    schema = file.schema_arrow
    if file.metadata.num_rows != width or "latent" not in schema.names:
        raise DamagedData(f"{path}: holds {file.metadata.num_rows} rows, expected one for each of {width} latents; {REMEDY}")
    known = pyarrow.schema([(name, kind) for name, kind in COLUMNS.items() if name in schema.names])
    return LatentFile(path, file, known, threading.Lock())


def read_columns(path: Path, columns: dict[str, pyarrow.DataType]) -> pyarrow.Table:
    """The `columns` that a small Parquet file has, in these types; DamagedData where it cannot be read."""
    known = opened_table(path, REMEDY).schema_arrow.names
    return read_table(path, [name for name in columns if name in known], REMEDY, columns)


def flat(batch: pyarrow.RecordBatch, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A column of lists of structs, flattened: the row of each entry [entries], and the fields [entries]."""
    column = batch.column(name)
    rows = np.asarray(column.value_parent_indices())
    entries = column.flatten()
    fields = {field.name: np.asarray(entries.field(field.name).fill_null(0)) for field in entries.type}
    return rows, fields


class Rows:
    """Whole rows of SAEs' tables, a file opened when one of its rows is first asked for. Threads share it."""

    def __init__(self) -> None:
        """Nothing is open."""
        self._latents: OrderedDict[Path, LatentFile] = OrderedDict()
        self._labels: OrderedDict[Path, pyarrow.Table] = OrderedDict()
        self._lock = threading.Lock()

    def latent(self, path: Path, width: int, latent: int, columns: Sequence[str] | None) -> dict[str, Any]:
        """A row of the latents.parquet at `path`; DamagedData where it cannot be read."""
        with self._lock:
            if path not in self._latents:
                self._latents[path] = open_latents(path, width)
            found = _used(self._latents, path)
        return found.row(latent, columns)

    def labels(self, path: Path, latent: int) -> list[dict[str, Any]]:
        """A latent's rows of the explanations.parquet at `path`; none where there is no such file."""
        with self._lock:
            if path not in self._labels:
                self._labels[path] = read_columns(path, EXPLANATIONS) if path.is_file() else EMPTY_EXPLANATIONS
            found = _used(self._labels, path)
        if not {"latent", "label"} <= set(found.schema.names):
            return []
        here = np.flatnonzero(np.asarray(found["latent"].fill_null(-1)) == latent)
        return [row for row in found.take(here).to_pylist() if row["label"]]


def _used(kept: OrderedDict[Path, Any], path: Path) -> Any:
    """The file at `path`, as the one used last; the one not used for longest is closed where there are too many."""
    kept.move_to_end(path)
    if len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[path]
