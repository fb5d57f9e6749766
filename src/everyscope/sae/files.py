"""A trained SAE on disk: its folded tensors and the record of how it came to be."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site

TENSOR_FILE, RECORD_FILE = "sae.safetensors", "sae.json"


def write_sae(folder: Path, sae: Sae, record: dict[str, Any]) -> None:
    """Write tensors, then record: a folder with a record is whole."""
    write_tensors(folder / TENSOR_FILE, sae.tensors())
    write_json(folder / RECORD_FILE, record)


def has_sae(folder: Path) -> bool:
    """True where a whole SAE lies in `folder`."""
    return (folder / RECORD_FILE).exists()


def read_record(folder: Path) -> dict[str, Any]:
    """How the SAE in `folder` came to be: site, scale, tokens, resolved config, parents."""
    return read_json(folder / RECORD_FILE)


def read_sae(folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE in `folder` and its record; DataError where there is none."""
    if not has_sae(folder):
        raise DataError(f"{folder}: holds no finished SAE ({RECORD_FILE} is missing); run `everyscope train` again to finish it")
    record = read_record(folder)
    return from_tensors(load_file(folder / TENSOR_FILE), metadata_of(record)), record


def metadata_of(record: dict[str, Any]) -> SaeMetadata:
    """What a record says of its SAE."""
    site = Site(record["site"], record["layer"]) if {"site", "layer"} <= record.keys() else None
    return SaeMetadata(site, record.get("model"), record.get("l0"), record.get("scale"), record.get("num_tokens"))


def trained_folders(root: Path) -> list[Path]:
    """The folders of all finished SAEs below `root`, in order of name."""
    return sorted(path.parent for path in root.rglob(RECORD_FILE))
