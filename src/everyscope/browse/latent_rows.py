"""latents.parquet as the index takes it in: batch by batch, checked against the columns that a suite may have.

Columns that are missing are absent from every row: a suite that was only evaluated has the first five.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from everyscope.base.errors import DamagedData
from everyscope.base.files import unreadable
from everyscope.base.tables import UNREADABLE, opened_table, read_table

REMEDY = "download the suite again, or describe and publish it again"
BATCH = 256
"""Rows taken at a time, which is the row group that describing writes [latents]."""

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


@dataclass(frozen=True)
class LatentFile:
    """An open latents.parquet."""

    path: Path
    file: pyarrow.parquet.ParquetFile
    schema: pyarrow.Schema
    """The columns that are there, in the types of COLUMNS."""

    @property
    def facts(self) -> str:
        """What describing says of the whole file, as JSON; an empty object where it was not described."""
        return ((self.file.schema_arrow.metadata or {}).get(b"everyscope") or b"{}").decode("utf-8", "replace")

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """Its rows in order, at most BATCH at a time; DamagedData where they cannot be read, or hold what no description has."""
        try:
            for batch in self.file.iter_batches(BATCH, columns=self.schema.names):
                columns = [batch.column(field.name).cast(field.type) for field in self.schema]
                for field, column in zip(self.schema, columns, strict=True):
                    _check(self.path, field.name, column)
                yield pyarrow.RecordBatch.from_arrays(columns, schema=self.schema)
        except UNREADABLE as error:
            raise unreadable(self.path, "Parquet", error, REMEDY) from error


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
    return LatentFile(path, file, pyarrow.schema([(name, kind) for name, kind in COLUMNS.items() if name in schema.names]))


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
