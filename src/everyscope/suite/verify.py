"""Whether a suite is what was published: files by their checksums, and suite.json by what the files hold. Torch-free."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from everyscope.base.errors import DamagedData
from everyscope.base.files import read_sealed, sha256
from everyscope.base.ids import content_id
from everyscope.base.tensors import read_header
from everyscope.suite.layout import CONFIG_FILE, COST_FILE, LATENTS_FILE, METRICS_FILE, NPZ_FILE, WEIGHTS_FILE
from everyscope.suite.records import REMEDY, SaeRecord, SuiteIndex, read_index
from everyscope.suite.scores import headline_of, read_metrics

NEEDED = (NPZ_FILE, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, LATENTS_FILE)
"""Files that every published SAE has."""


def verify_suite(suite: Path) -> None:
    """Compare every file with its checksum in suite.json, and suite.json with the files.

    DamagedData names the first file that differs or is missing; DataError where suite.json is of another form.
    """
    index = read_index(suite)
    for record in index.saes:
        for name in NEEDED:
            if name not in record.files:
                raise DamagedData(f"{suite / record.folder}: suite.json lists no {name} of it; {REMEDY}")
    for name, checksum in checksums(index).items():
        verify_file(suite / name, checksum)
    for record in index.saes:
        _verify_record(suite / record.folder, record)
    verify_cost(suite, index)


def checksums(index: SuiteIndex) -> dict[str, str]:
    """SHA-256 of every file that the index lists, by path below the suite."""
    found = dict(index.files)
    for record in index.saes:
        found |= {f"{record.folder}/{name}": checksum for name, checksum in record.files.items()}
    return found


def verify_file(path: Path, checksum: str) -> None:
    """DamagedData where a file is missing or another one than was published."""
    if not path.is_file():
        raise DamagedData(f"{path}: listed in suite.json but missing; {REMEDY}")
    if (got := sha256(path)) != checksum:
        raise DamagedData(f"{path}: SHA-256 is {got[:12]}…, expected {checksum[:12]}…; {REMEDY}")


def counts_identity(cost: dict[str, Any] | None) -> str | None:
    """Hash of what an evaluation has cost, without its seconds."""
    return None if cost is None else content_id({name: count for name, count in cost.items() if name != "seconds"})


def _verify_record(folder: Path, record: SaeRecord) -> None:
    """That sizes are those of the tensors in both formats, and headline numbers those of metrics.json."""
    shape = (record.d_in, record.width)
    header = read_header(folder / WEIGHTS_FILE).get("W_enc")
    found_there = header.get("shape") if isinstance(header, dict) else None
    sizes = {WEIGHTS_FILE: found_there, NPZ_FILE: npz_shape(folder / NPZ_FILE, "W_enc")}
    for name, found in sizes.items():
        if not isinstance(found, list | tuple) or tuple(found) != shape:
            raise DamagedData(f"{folder / name}: W_enc has shape {found}, suite.json says {shape}; {REMEDY}")
    path = folder / METRICS_FILE
    metrics = read_metrics(path)
    recorded: dict[str, Any] = {"site": record.site, "layer": record.layer, "d_in": record.d_in, "width": record.width}
    recorded |= record.metrics.model_dump()
    try:
        found = metrics | headline_of(metrics, is_canonical=record.metrics.is_canonical).model_dump()
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise DamagedData(f"{path}: has not the numbers that suite.json shows ({type(error).__name__}); {REMEDY}") from error
    for name, want in recorded.items():
        if name not in found or found[name] != want:
            raise DamagedData(f"{path}: {name} is {found.get(name)!r}, suite.json says {want!r}; {REMEDY}")


def npz_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of one array in an npz file, whose numbers are not read; DamagedData where it has none such."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0]
    except Exception as error:  # of zipfile and numpy's parser: not a closed set
        raise DamagedData(f"{path}: has no array {name} that can be read; {REMEDY}") from error


def verify_cost(suite: Path, index: SuiteIndex) -> None:
    """DamagedData where cost.json is not what was published."""
    path = suite / COST_FILE
    if index.cost is None and not path.exists():
        return
    if counts_identity(read_sealed(path, REMEDY) if path.exists() else None) != index.cost:
        raise DamagedData(f"{path}: is missing, or not what suite.json was published with; {REMEDY}")
