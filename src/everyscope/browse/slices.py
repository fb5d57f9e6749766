"""The suite's comparisons (suite/slices/*.json and the tables of feature splitting), read when a page shows them.

A suite comes from anywhere: the names of files inside these JSONs are taken only where they stay below the suite.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed
from everyscope.base.progress import say
from everyscope.base.tables import check_table
from everyscope.browse.latent_rows import read_columns

FOLDER, SPLITTING = "slices", "splitting"
REMEDY = "publish or download the suite again"
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


def slice_names(suite: Path) -> list[str]:
    """The names of the comparisons."""
    return sorted(path.stem for path in (suite / FOLDER).glob("*.json"))


def read_slices(suite: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each comparison; one that is no JSON is said and left out."""
    for name in slice_names(suite):
        try:
            yield name, _read(suite / FOLDER / f"{name}.json")
        except DataError as error:
            say(f"  {error}")


def read_splits(
    suite: Path, slices: dict[str, Any], narrow: str, wide: str
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """For a pair of widths, by their folders: its shares, and its first pairs of latents; None where it was not measured."""
    pairs = (slices.get(SPLITTING) or {}).get("pairs") or []
    for pair in pairs:
        if isinstance(pair, dict) and (pair.get("narrow"), pair.get("wide")) == (narrow, wide):
            try:
                return pair, _rows(_inside(suite / FOLDER, str(pair.get("table", ""))))
            except DataError as error:
                say(f"  {error}")
    return None


def _read(path: Path) -> dict[str, Any]:
    """A comparison; DataError where it is no JSON object, or was changed since it was published."""
    return read_sealed(path, REMEDY)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` below `folder`; DataError where it leads elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{folder}: names the table {name!r}, which lies outside; publish the suite again")
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """The pairs of latents in a table of splitting, highest cosine first, at most ROWS."""
    check_table(path, REMEDY)
    table = read_columns(path, COLUMNS)
    if "cosine" in table.schema.names:
        table = table.sort_by([("cosine", "descending")])
    return table.slice(0, ROWS).to_pylist()
