"""latents.parquet: written range by range, so that an SAE of any width fits; its surroundings may be replaced later."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from everyscope.base.errors import DataError, first_line
from everyscope.base.tables import check_table, new_table
from everyscope.describe.columns import SURROUNDING_COLUMNS
from everyscope.describe.targets import METADATA_KEY, DescribeTarget
from everyscope.suite.latents import SCHEMA

ROW_GROUP = 256
"""Latents that are read together [latents]."""
RANGE = 16 * ROW_GROUP
"""Latents that are measured and written together [latents]."""
COMPRESSION_LEVEL = 9


def _leaves(path: str, kind: pyarrow.DataType) -> Iterator[tuple[str, pyarrow.DataType]]:
    """The columns that Parquet keeps for one of ours, and their types."""
    if pyarrow.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pyarrow.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    else:
        yield path, kind


def _encoding(kind: pyarrow.DataType) -> str:
    """What zstd is helped most by: the bytes of floats side by side, integers as differences, the many zeros as they are."""
    if pyarrow.types.is_float16(kind):
        return "PLAIN"
    if pyarrow.types.is_floating(kind):
        return "BYTE_STREAM_SPLIT"
    return "PLAIN" if kind.bit_width < 32 else "DELTA_BINARY_PACKED"


ENCODINGS = {path: _encoding(kind) for field in SCHEMA for path, kind in _leaves(field.name, field.type)}
"""Parquet's encoding of each of its columns. Dictionaries, the default, made the files a quarter larger."""

Ranges = Callable[[int, int], Mapping[str, pyarrow.Array]]
"""Columns of the latents from the first number on to before the second."""


def ranges_of(width: int) -> Iterator[tuple[int, int]]:
    """The ranges of latents of an SAE, in order."""
    return ((first, min(first + RANGE, width)) for first in range(0, width, RANGE))


def write_latents(path: Path, width: int, facts: Mapping[str, Any], columns: Ranges) -> None:
    """Write the table of an SAE, whole or not at all; `columns` gives all of a range's columns."""
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(facts, allow_nan=False)})
    with new_table(
        path,
        schema,
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=False,
        column_encoding=ENCODINGS,
        write_statistics=False,
    ) as writer:
        for first, last in ranges_of(width):
            found = columns(first, last)
            table = pyarrow.table([found[name] for name in SCHEMA.names], schema=writer.schema)
            writer.write_table(table, row_group_size=ROW_GROUP)


def measured_before(path: Path) -> Ranges:
    """The columns that an earlier run measured, without those of the surroundings."""
    check_table(path, "delete it and run `everyscope describe` again")
    table = pyarrow.parquet.read_table(path, schema=SCHEMA)
    names = [name for name in SCHEMA.names if name not in SURROUNDING_COLUMNS]

    def columns(first: int, last: int) -> dict[str, pyarrow.Array]:
        part = table.slice(first, last - first).combine_chunks()
        return {name: part.column(name).chunk(0) for name in names}

    return columns


def held_out_columns(target: DescribeTarget) -> Ranges:
    """How often each latent fires on held-out text, by its evaluation; DataError where that is of another width or form."""
    try:
        check_table(target.scores, "delete its folder and run `everyscope evaluate` again")
        table = pyarrow.parquet.read_table(target.scores, columns=["firings", "frequency"])
        firings = table["firings"].combine_chunks().cast(pyarrow.int64())
        frequency = pyarrow.array(np.asarray(table["frequency"]).astype(np.float32))
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{target.scores}: cannot be read ({first_line(error)}); run `everyscope evaluate` again") from error
    if len(firings) != target.width:
        raise DataError(f"{target.scores}: holds {len(firings)} latents, the SAE {target.width}; run `everyscope evaluate` again")

    def columns(first: int, last: int) -> dict[str, pyarrow.Array]:
        part = slice(first, last)
        return {"held_out_firings": firings[part], "held_out_frequency": frequency[part]}

    return columns
