"""The comparisons over a whole suite, taken from the scores into the suite, with SAEs called by their folders there."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import make_folder, read_sealed, sha256, storage_errors, whole_file, write_sealed
from everyscope.base.tables import check_table
from everyscope.suite.layout import COST_FILE, SLICES_FOLDER

REMEDY = "delete it and run `everyscope evaluate` again"
NAMING = ("sae", "narrow", "wide", "name")
"""Keys under which a slice names an SAE."""
SOURCES = ("base", "tuned")
"""What the transfer slice says under `sae`: whose SAE it is, not which."""


def slice_files(scores: Path) -> list[Path]:
    """Every file of the slices below `scores`, JSON and Parquet, in order of path."""
    folder = scores / SLICES_FOLDER
    return sorted(path for pattern in ("*.json", "**/*.parquet") for path in folder.glob(pattern))


def publish_slices(scores: Path, suite: Path, folders: Mapping[str, str]) -> dict[str, Any]:
    """Copy all slices into the suite and return them by name; `folders` leads from an SAE's name in the run to its place.

    Tables are copied as they are, under the paths that splitting.json tells. DataError for a slice about an SAE that is not
    published, or about a table that is not there.
    """
    slices = {}
    for path in slice_files(scores):
        target = suite / SLICES_FOLDER / path.relative_to(scores / SLICES_FOLDER)
        if path.suffix == ".json":
            slices[path.stem] = _renamed(read_sealed(path, REMEDY), folders, path)
            write_sealed(target, slices[path.stem])
        else:
            check_table(path, REMEDY)
            with whole_file(target) as partial, storage_errors(target):
                shutil.copyfile(path, partial)
    for pair in slices.get("splitting", {}).get("pairs", []):
        if not (suite / SLICES_FOLDER / pair["table"]).is_file():
            raise DataError(f"{scores / SLICES_FOLDER}: splitting.json names {pair['table']}, which is missing; evaluate again")
    _remove_others(suite / SLICES_FOLDER, {path.relative_to(scores / SLICES_FOLDER).as_posix() for path in slice_files(scores)})
    return slices


def read_cost(scores: Path) -> dict[str, Any] | None:
    """What the evaluation has cost; None where nothing tells it, DamagedData where it was changed since."""
    if not (scores / COST_FILE).exists():
        return None
    return {name: value for name, value in read_sealed(scores / COST_FILE, REMEDY).items() if name != "entries"}


def publish_cost(scores: Path, suite: Path) -> dict[str, Any] | None:
    """Copy what the evaluation has cost, and return it.

    The one file of a suite that no two runs have alike, for it holds seconds: it has its own checksum, and suite.json that of the
    rest of it.
    """
    cost = read_cost(scores)
    if cost is None:
        (suite / COST_FILE).unlink(missing_ok=True)
    else:
        write_sealed(suite / COST_FILE, cost)
    return cost


def slice_checksums(scores: Path) -> dict[str, str]:
    """The hash of every slice's file, by path below `scores`."""
    return {path.relative_to(scores).as_posix(): sha256(path) for path in slice_files(scores)}


def published_slices(suite: Path) -> list[str]:
    """The paths below the suite of all slices that lie there."""
    return [path.relative_to(suite).as_posix() for path in slice_files(suite)]


def _renamed(value: Any, folders: Mapping[str, str], path: Path) -> Any:
    """`value` with every SAE's name replaced by its folder."""
    if isinstance(value, list):
        return [_renamed(item, folders, path) for item in value]
    if not isinstance(value, dict):
        return value
    is_other_suite = value.get("sae") == "tuned"
    found = {}
    for key, item in value.items():
        found[key] = _renamed(item, folders, path)
        if key in NAMING and isinstance(item, str) and not is_other_suite:
            found[key] = folders.get(item, item)
            if key != "name" and item not in folders and item not in SOURCES:
                raise DataError(f"{path}: is about {item}, which is not published; run `everyscope evaluate` again")
    return found


def _remove_others(folder: Path, names: set[str]) -> None:
    """Delete slices of an earlier publication."""
    make_folder(folder)
    for pattern in ("*.json", "**/*.parquet"):
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in names:
                path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()
