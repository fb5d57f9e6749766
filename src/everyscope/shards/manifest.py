"""The records beside shards, torch-free: a sidecar commits its shard, a manifest commits the folder.

    shard_00000.safetensors   the rows of one bucket
    shard_00000.json          its sidecar: sizes, checksums, sums, the place in the text behind it
    statistics.json           figures over all shards
    manifest.json             written last: a folder that has it is whole and never changes again

No record holds a time or a host, so that the same harvest gives the same bytes wherever and however often it was interrupted.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, sha256, write_json
from everyscope.base.schema import Schema
from everyscope.shards.format import Layout, TensorDtype, activation_layout, token_layout
from everyscope.shards.statistics import Sums, SumsRecord

MANIFEST = "manifest.json"
STATISTICS = "statistics.json"
TOKENS = "tokens"
"""Stands as `site` in the manifest of the tokens, and is their folder beside the sites' folders."""
Record = TypeVar("Record", bound=Schema)


class ShardRecord(Schema):
    """A sidecar: what one shard's file must be."""

    file: str
    """The shard's file name, in the sidecar's folder."""
    num_bytes: int = Field(gt=0)
    """Its size [bytes]."""
    rows: int = Field(gt=0)
    """Rows in it: activations, or blocks for tokens [rows]."""
    d_in: int = Field(gt=0)
    """Numbers per row: the site's width, or the context for tokens."""
    dtype: TensorDtype
    """Number format of the rows; int32 for tokens."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    xxh3: tuple[str, ...]
    """xxh3 of each block of 4 MiB of the file, in hexadecimal."""
    after: dict[str, int]
    """The place in the text behind this shard, as its writer counts: all that is needed to go on."""
    statistics: SumsRecord | None
    """Sums over the rows; tokens have none."""

    @property
    def layout(self) -> Layout:
        """How the file is laid out."""
        if self.dtype == "int32":
            return token_layout(self.rows, self.d_in)
        return activation_layout(self.rows, self.d_in, self.dtype)


class ShardEntry(Schema):
    """One shard in a manifest."""

    file: str
    """File name in the manifest's folder."""
    num_bytes: int
    """Its size [bytes]."""
    rows: int
    """Rows in it [rows]."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    sidecar_sha256: str
    """SHA-256 of its sidecar, which holds the blocks' checksums and the sums."""


class Manifest(Schema):
    """Everything about a folder of shards; its content id is the folder's identity."""

    version: str
    """The everyscope that wrote the folder."""
    site: str
    """The site's folder name, as in resid_post/layer_3, or `tokens`."""
    d_in: int
    """Numbers per row: the site's width, or the context for tokens."""
    dtype: TensorDtype
    """Number format of the rows."""
    num_rows: int
    """Rows in all shards [rows]."""
    shards: tuple[ShardEntry, ...]
    """The shards in reading order."""
    config: dict[str, Any]
    """The resolved config of the stage that wrote it."""
    parents: dict[str, str]
    """Identities of what it was made from."""


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` of a folder lies."""
    return folder / f"shard_{index:05d}.safetensors"


def sidecar_path(shard: Path) -> Path:
    """Where the sidecar of a shard lies."""
    return shard.with_suffix(".json")


def read_sidecar(shard: Path) -> ShardRecord:
    """The sidecar of `shard`; DataError where it is missing or no sidecar."""
    return _parse(ShardRecord, sidecar_path(shard))


def is_committed(shard: Path) -> bool:
    """Whether `shard` was written to its end: its sidecar stands, and its file has the size recorded there."""
    if not sidecar_path(shard).is_file() or not shard.is_file():
        return False
    return shard.stat().st_size == read_sidecar(shard).num_bytes


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; DataError where there is none, so also where the harvest has not finished."""
    return _parse(Manifest, folder / MANIFEST)


def seal_folder(
    folder: Path, num_shards: int, *, site: str, config: dict[str, Any], parents: dict[str, str], version: str
) -> Manifest:
    """Commit `folder` with its first `num_shards` shards, all committed: write statistics (of activations), then the manifest."""
    entries, sums, last = [], None, None
    for index in range(num_shards):
        path = shard_path(folder, index)
        last = read_sidecar(path)
        digest = sha256(sidecar_path(path))
        entries.append(
            ShardEntry(file=last.file, num_bytes=last.num_bytes, rows=last.rows, sha256=last.sha256, sidecar_sha256=digest)
        )
        if last.statistics is not None:
            sums = sums or Sums(last.d_in, len(last.statistics.position_count))
            sums.merge(Sums.of_record(last.statistics))
    assert last is not None, f"{folder}: no shards to seal"
    if sums is not None:
        write_json(folder / STATISTICS, sums.statistics().as_json())
    manifest = Manifest(
        version=version,
        site=site,
        d_in=last.d_in,
        dtype=last.dtype,
        num_rows=sum(entry.rows for entry in entries),
        shards=tuple(entries),
        config=config,
        parents=parents,
    )
    write_json(folder / MANIFEST, manifest.as_json())
    return manifest


def _parse(kind: type[Record], path: Path) -> Record:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path}: {where}: {problem['msg']}; delete it and run the same harvest again") from error
