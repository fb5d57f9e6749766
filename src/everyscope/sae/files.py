"""A trained SAE on disk: its folded tensors and the record of how it came to be.

The record holds the SHA-256 of the tensors' file, by which everything made from these weights knows them without reading them
again, and its own identity: a file that changed since is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from everyscope.base.errors import DamagedData, DataError, NonFinite, ShapeMismatch
from everyscope.base.files import read_sealed, sha256, unreadable, write_sealed
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import CONVENTIONS, Site, parse_folder

TENSOR_FILE, RECORD_FILE = "sae.safetensors", "sae.json"
WEIGHTS = "weights_sha256"
"""The record's key of the SHA-256 of TENSOR_FILE."""


def write_sae(folder: Path, sae: Sae, record: dict[str, Any]) -> None:
    """Write tensors, then record: a folder with a record is whole."""
    write_tensors(folder / TENSOR_FILE, sae.tensors())
    write_record(folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of the tensors that lie in `folder`."""
    write_sealed(folder / RECORD_FILE, record | {WEIGHTS: sha256(folder / TENSOR_FILE)})


def has_sae(folder: Path) -> bool:
    """True where a whole SAE lies in `folder`."""
    return (folder / RECORD_FILE).exists()


def read_record(folder: Path) -> dict[str, Any]:
    """How the SAE in `folder` came to be: site, scale, tokens, resolved config, parents; DamagedData where it was changed."""
    record = read_sealed(folder / RECORD_FILE, _remedy(folder))
    if not isinstance(record.get(WEIGHTS), str):
        raise DataError(f"{folder / RECORD_FILE}: has no {WEIGHTS}; {_remedy(folder)}")
    return record


def weights_digest(folder: Path) -> str:
    """The SHA-256 of the weights of the SAE in `folder`, as its record has it: `read_sae` compares it with the weights."""
    return read_record(folder)[WEIGHTS]


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run `everyscope train` again"


def read_sae(folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE in `folder` and its record; DataError where there is none, DamagedData where its weights are not those recorded."""
    if not has_sae(folder):
        raise DataError(f"{folder}: holds no finished SAE ({RECORD_FILE} is missing); run `everyscope train` again to finish it")
    path, record = folder / TENSOR_FILE, read_record(folder)
    if (got := sha256(path)) != record[WEIGHTS]:
        raise DamagedData(f"{path}: SHA-256 is {got[:12]}…, its record has {record[WEIGHTS][:12]}…; {_remedy(folder)}")
    try:
        return from_tensors(safetensors.torch.load_file(path), metadata_of(record)), record
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error
    except (ShapeMismatch, NonFinite) as error:
        raise type(error)(f"{path}: {error}") from error


def metadata_of(record: dict[str, Any]) -> SaeMetadata:
    """What a record says of its SAE, or of its transcoder: that has the place it `reads` and a kind of its own."""
    known = SaeMetadata(None, record.get("model"), record.get("l0"), record.get("scale"), record.get("num_tokens"))
    if not {"site", "layer"} <= record.keys():
        return known
    site = Site(record["site"], record["layer"])
    if site.inputs == site.outputs:
        return replace(known, site=site)
    reads = parse_folder(record["reads"])
    return replace(known, site=reads, target=site.outputs[0], convention=CONVENTIONS.get(reads.kind))


def trained_folders(root: Path) -> list[Path]:
    """The folders of all finished SAEs below `root`, in order of name."""
    return sorted(path.parent for path in root.rglob(RECORD_FILE))
