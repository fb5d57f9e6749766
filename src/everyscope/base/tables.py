"""Parquet files of ours, which hold their own checksum, and Parquet files of anybody's, read within bounds. Torch-free."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import xxhash

from everyscope.base.errors import DamagedData
from everyscope.base.files import human_bytes, require_file, unreadable, whole_file

CHECKSUM, UNSEALED = "checksum", "0" * 32
"""Key in the metadata of a sealed file: xxh3-128 of the whole file, with this in the checksum's place."""
HELD = re.compile(CHECKSUM.encode() + rb"\x18\x20([0-9a-f]{32})")
"""How the checksum stands in a footer, in Thrift's compact protocol: the key, then a field of 32 bytes."""
CHUNK_BYTES, FOOTER_BYTES = 1 << 24, 1 << 20
"""Read at once, and the end of a file in which its checksum stands [bytes]."""
MAX_TABLE_BYTES = 1 << 30
"""What a table may take in memory by what its file says of itself [bytes]."""
VALUE_BYTES = 8
"""What a value is reckoned to take at least: an encoding may spell a million of them in a few bytes [bytes]."""
BATCH_ROWS = 1 << 10
"""Rows unpacked at once [rows]."""
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError)
"""What Arrow raises over a file that it cannot read: its own errors, and Python's for names that are no UTF-8 or come twice."""


@contextmanager
def new_table(path: Path, schema: pyarrow.Schema, **options: Any) -> Iterator[pyarrow.parquet.ParquetWriter]:
    """A writer of tables of `schema` into a sealed file, whole or not at all. Equal tables give equal bytes."""
    sealed = schema.with_metadata({**(schema.metadata or {}), CHECKSUM.encode(): UNSEALED})
    with whole_file(path) as partial:
        with pyarrow.parquet.ParquetWriter(partial, sealed, **options) as writer:
            yield writer
        _seal(partial)


def write_table(path: Path, table: pyarrow.Table, *, row_group_size: int | None = None, **options: Any) -> None:
    """Write a table into a sealed file, whole or not at all."""
    with new_table(path, table.schema, **options) as writer:
        sealed = table.replace_schema_metadata({**(table.schema.metadata or {}), CHECKSUM.encode(): UNSEALED})
        writer.write_table(sealed, row_group_size=row_group_size)


def _seal(path: Path) -> None:
    """Put the file's checksum into its footer, where UNSEALED stands."""
    digest, place = _digest(path, UNSEALED.encode())
    assert place is not None, f"{path}: no place for a checksum in its footer"
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def check_table(path: Path, remedy: str) -> None:
    """DamagedData, which ends with `remedy`, unless `path` is a sealed Parquet file whose bytes agree with its checksum.

    Arrow does not see the file before: a damaged one can crash it, and the whole process with it.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - FOOTER_BYTES))
            held = HELD.findall(file.read())
        got = _digest(path, held[-1])[0] if held else ""
    except OSError as error:
        raise unreadable(path, "Parquet", error, remedy) from error
    if not held:
        raise unreadable(path, "Parquet", "its footer has no checksum, as every table of a run or a suite has", remedy)
    if got.encode() != held[-1]:
        raise DamagedData(f"{path}: its checksum is {got[:12]}…, expected {held[-1][:12].decode()}…; {remedy}")


def _digest(path: Path, held: bytes) -> tuple[str, int | None]:
    """The checksum of a file in whose last bytes `held` counts as UNSEALED, and where that stands."""
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    left = size - min(size, FOOTER_BYTES)
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        start, footer = file.tell(), file.read()
    place = footer.rfind(held)
    digest.update(footer if place < 0 else footer[:place] + UNSEALED.encode() + footer[place + len(held) :])
    return digest.hexdigest(), None if place < 0 else start + place


def opened_table(path: Path, remedy: str) -> pyarrow.parquet.ParquetFile:
    """A sealed Parquet file, open; DamagedData where it was changed, cannot be read, or says that it unpacks to too much."""
    check_table(path, remedy)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        metadata, width = file.metadata, len(file.schema_arrow.names)  # which are decoded only now
        # What a footer says of columns is not asked for: with histograms of a wrong size the question itself ends the process.
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            needed = max(group.total_byte_size, VALUE_BYTES * group.num_rows * width)
            if min(group.total_byte_size, group.num_rows) < 0 or needed > MAX_TABLE_BYTES:
                raise DamagedData(f"{path}: a group of its rows would take {human_bytes(needed)} in memory; {remedy}")
    except UNREADABLE as error:
        raise unreadable(path, "Parquet", error, remedy) from error
    return file


def read_table(
    path: Path, columns: Sequence[str], remedy: str, types: Mapping[str, pyarrow.DataType] | None = None
) -> pyarrow.Table:
    """These columns of a Parquet file, cast where `types` names them.

    DamagedData where one is missing, of another type, or cannot be read, or where the whole would take too much memory.
    """
    file = opened_table(path, remedy)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise DamagedData(f"{path}: has no column {missing[0]!r}; {remedy}")
    try:
        batches, num_bytes = [], 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            batches.append(batch)
            num_bytes += batch.nbytes
            if num_bytes > MAX_TABLE_BYTES:
                raise DamagedData(f"{path}: takes more than {human_bytes(MAX_TABLE_BYTES)} in memory; {remedy}")
        schema = pyarrow.schema([file.schema_arrow.field(name) for name in columns])
        table = pyarrow.Table.from_batches([batch.select(list(columns)) for batch in batches], schema)
        return pyarrow.table({name: table[name].cast((types or {}).get(name, table[name].type)) for name in columns})
    except UNREADABLE as error:
        raise unreadable(path, "Parquet", error, remedy) from error
