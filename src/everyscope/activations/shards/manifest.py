"""The records beside shards, torch-free: a sidecar commits its shard, a manifest commits the folder.

    shard_00000.safetensors   the rows of one bucket
    shard_00000.json          its sidecar: sizes, checksums, sums, the place in the text behind it
    statistics.json           figures over all shards
    manifest.json             written last, with its own identity: a folder that has it is whole

The shards that a manifest names never change again. A harvest that extends them replaces the manifest atomically, and
who has opened the old one reads on. No record holds a time or a host, so that the same harvest gives the same bytes wherever
and however often it was interrupted.

`site` is a free name: that of a place in a language model (resid_post/layer_3, which `sites.names.parse_folder` understands),
`tokens`, or whatever an imported array was called. Shards never parse it; only stages that need a place in a model do.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from everyscope.activations.shards.format import Layout, TensorDtype, layout_of
from everyscope.activations.shards.statistics import Sums, SumsRecord
from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import parse_json, read_bytes, write_json, write_text
from everyscope.base.ids import content_id
from everyscope.base.schema import Schema

MANIFEST = "manifest.json"
STATISTICS = "statistics.json"
TOKENS = "tokens"
"""Stands as `site` in the manifest of the tokens, and is their folder beside the sites' folders."""
IDENTITY = "identity"
"""The key in manifest.json of the content id of all other keys, by which a manifest is known to be whole."""
SHARD_NAME = r"^shard_[0-9]{5,}\.safetensors$"
"""What a shard's file may be called: a record names files of its own folder, and no others."""
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*){0,3}$"
"""What a site may be called."""
REMEDY = "run the same harvest again with --repair"
Record = TypeVar("Record", bound=Schema)


class ShardRecord(Schema):
    """A sidecar: what one shard's file must be."""

    file: str = Field(pattern=SHARD_NAME)
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
    """The place in the text behind this shard, as its writer counts: all that is needed to resume."""
    statistics: SumsRecord | None
    """Sums over the rows; tokens have none."""

    @property
    def layout(self) -> Layout:
        """How the file is laid out."""
        return layout_of(self.rows, self.d_in, self.dtype)


class ShardEntry(Schema):
    """One shard in a manifest."""

    file: str = Field(pattern=SHARD_NAME)
    """File name in the manifest's folder."""
    num_bytes: int = Field(gt=0)
    """Its size [bytes]."""
    rows: int = Field(gt=0)
    """Rows in it [rows]."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    sidecar_sha256: str
    """SHA-256 of its sidecar, which holds the blocks' checksums and the sums."""


class Manifest(Schema):
    """Everything about a folder of shards; its content id is the folder's identity."""

    version: str
    """The everyscope that wrote the folder."""
    site: str = Field(pattern=SITE_NAME, max_length=200)
    """The site's folder name, as in resid_post/layer_3; `tokens`; or the name of what was imported."""
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
    """Identities of what it was made from; `earlier` is the folder's own before a harvest extended it."""
    statistics_sha256: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """SHA-256 of statistics.json; None for tokens."""

    def layout(self, rows: int) -> Layout:
        """The layout of a shard with `rows` rows in this folder."""
        return layout_of(rows, self.d_in, self.dtype)

    @property
    def identity(self) -> str:
        """The content id of the manifest, and with it of every byte of the shards."""
        return content_id(self.as_json())


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` of a folder lies."""
    return folder / f"shard_{index:05d}.safetensors"


def sidecar_path(shard: Path) -> Path:
    """Where the sidecar of a shard lies."""
    return shard.with_suffix(".json")


def parse_sidecar(data: bytes, entry: ShardEntry, manifest: Manifest, name: Path | str) -> ShardRecord:
    """The sidecar that a manifest's entry names; DamagedData where these bytes are another."""
    if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
        raise DamagedData(f"{name}: differs from its checksum in {MANIFEST}; {REMEDY}")
    record = _validated(ShardRecord, parse_json(data, name), name)
    expected = (entry.file, entry.rows, entry.num_bytes, entry.sha256, manifest.d_in, manifest.dtype)
    if (record.file, record.rows, record.num_bytes, record.sha256, record.d_in, record.dtype) != expected:
        raise DamagedData(f"{name}: disagrees with {MANIFEST} about size, d_in or dtype; {REMEDY}")
    return record


def read_sidecar(shard: Path) -> ShardRecord:
    """The sidecar of `shard`, on its own word; DataError where it is missing or no sidecar."""
    return _validated(ShardRecord, parse_json(read_bytes(sidecar_path(shard)), sidecar_path(shard)), sidecar_path(shard))


def is_committed(shard: Path) -> bool:
    """Whether `shard` was written to its end: its sidecar stands, and its file has the size recorded there."""
    if not sidecar_path(shard).is_file() or not shard.is_file():
        return False
    return shard.stat().st_size == read_sidecar(shard).num_bytes


def parse_manifest(data: bytes, name: Path | str) -> Manifest:
    """The manifest that manifest.json spells; DataError where it is none, DamagedData where it differs from its checksum."""
    value = parse_json(data, name)
    identity = value.pop(IDENTITY, None) if isinstance(value, dict) else None
    manifest = _validated(Manifest, value, name)
    if identity != manifest.identity:
        raise DamagedData(f"{name}: differs from its own checksum; {REMEDY}")
    if manifest.num_rows != sum(entry.rows for entry in manifest.shards):
        raise DamagedData(f"{name}: num_rows={manifest.num_rows} is not the sum of its shards; {REMEDY}")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; DataError where there is none, so also where the harvest has not finished."""
    return parse_manifest(read_bytes(folder / MANIFEST), folder / MANIFEST)


def merged_sums(records: Iterable[ShardRecord]) -> Sums | None:
    """The sums over all rows of some shards, in order; None for tokens."""
    sums = None
    for record in records:
        if record.statistics is not None:
            sums = sums or Sums(record.d_in, len(record.statistics.position_count))
            sums.merge(Sums.of_record(record.statistics))
    return sums


def statistics_bytes(sums: Sums) -> bytes:
    """What statistics.json holds for these sums, to the byte."""
    return (json.dumps(sums.statistics().record().as_json(), indent=2, allow_nan=False) + "\n").encode()


def seal_folder(
    folder: Path, num_shards: int, *, site: str, config: dict[str, Any], parents: dict[str, str], version: str
) -> Manifest:
    """Commit `folder` with its first `num_shards` shards, all committed: write statistics (of activations), then the manifest."""
    records, entries = [], []
    for path in (shard_path(folder, index) for index in range(num_shards)):
        record, digest = read_sidecar(path), hashlib.sha256(read_bytes(sidecar_path(path))).hexdigest()
        records.append(record)
        entries.append(
            ShardEntry(
                file=record.file, num_bytes=record.num_bytes, rows=record.rows, sha256=record.sha256, sidecar_sha256=digest
            )
        )
    assert records, f"{folder}: no shards to seal"
    sums, digest = merged_sums(records), None
    if sums is not None:
        statistics = statistics_bytes(sums)
        digest = hashlib.sha256(statistics).hexdigest()
        write_text(folder / STATISTICS, statistics.decode())
    manifest = Manifest(
        version=version,
        site=site,
        d_in=records[-1].d_in,
        dtype=records[-1].dtype,
        num_rows=sum(entry.rows for entry in entries),
        shards=tuple(entries),
        config=config,
        parents=parents,
        statistics_sha256=digest,
    )
    write_json(folder / MANIFEST, {IDENTITY: manifest.identity} | manifest.as_json())
    return manifest


def _validated(kind: type[Record], value: Any, name: Path | str) -> Record:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{name}: {where}: {problem['msg']}; delete it and run the same harvest again") from error
