"""The suite's comparisons (suite/slices/*.json and the tables of feature splitting), read for the index.

A suite comes from anywhere: the names of files inside these JSONs are taken only where they stay below the suite.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed
from everyscope.base.progress import say
from everyscope.browse.latent_rows import read_columns

FOLDER, SPLITTING = "slices", "splitting"
ROWS = 500
"""Pairs of latents kept per pair of SAEs, highest cosine first [pairs]."""
COLUMNS: dict[str, pyarrow.DataType] = {
    "narrow": pyarrow.int32(),
    "wide": pyarrow.int32(),
    "cosine": pyarrow.float32(),
    "null_p": pyarrow.float32(),
    "cofiring": pyarrow.float32(),
    "conditional": pyarrow.float32(),
    "relation": pyarrow.string(),
}


def read_slices(suite: Path) -> Iterator[tuple[str, str]]:
    """Name and JSON of each comparison; one that is no JSON is said and left out."""
    for path in sorted((suite / FOLDER).glob("*.json")):
        try:
            yield path.stem, json.dumps(_read(path))
        except DataError as error:
            say(f"  {error}")


def read_splits(suite: Path, numbers: dict[str, int]) -> Iterator[tuple[int, int, str, bytes]]:
    """For each pair of widths: both SAEs' numbers, the shares as JSON, and its first pairs of latents as an Arrow stream."""
    path = suite / FOLDER / f"{SPLITTING}.json"
    if not path.is_file():
        return
    try:
        found = _read(path)
    except DataError:
        return  # read_slices has said so
    pairs = found.get("pairs") or []
    for pair in pairs:
        narrow, wide = numbers.get(str(pair.get("narrow"))), numbers.get(str(pair.get("wide")))
        if narrow is None or wide is None:
            continue
        try:
            yield narrow, wide, json.dumps(pair), _stream(_inside(suite / FOLDER, str(pair.get("table", ""))))
        except DataError as error:
            say(f"  {error}")


def _read(path: Path) -> dict[str, Any]:
    """A comparison; DataError where it is no JSON object, or was changed since it was published."""
    return read_sealed(path, "publish or download the suite again")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` below `folder`; DataError where it leads elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{folder}: names the table {name!r}, which lies outside; publish the suite again")
    return path


def _stream(path: Path) -> bytes:
    table = read_columns(path, COLUMNS)
    if "cosine" in table.schema.names:
        table = table.sort_by([("cosine", "descending")])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, ROWS))
    return sink.getvalue().to_pybytes()


def split_rows(stream: bytes) -> list[dict[str, Any]]:
    """The pairs of latents in such a stream."""
    return pyarrow.ipc.open_stream(stream).read_all().to_pylist()
