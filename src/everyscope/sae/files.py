"""A trained SAE on disk: its folded tensors and the record of how it came to be."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae, from_tensors

TENSOR_FILE, RECORD_FILE = "sae.safetensors", "sae.json"


def save_sae(folder: Path, sae: Sae, record: dict[str, Any]) -> None:
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
    return from_tensors(load_file(folder / TENSOR_FILE)), read_record(folder)


def trained_folders(root: Path) -> list[Path]:
    """The folders of all finished SAEs below `root`, in order of name."""
    return sorted(path.parent for path in root.rglob(RECORD_FILE))
