"""Finding and removing what differs from its checksum: a harvest then rewrites just that."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from everyscope.activations.shards.checksums import checksums_of
from everyscope.activations.shards.manifest import (
    MANIFEST,
    STATISTICS,
    Manifest,
    merged_sums,
    read_manifest,
    read_sidecar,
    sidecar_path,
    statistics_bytes,
)
from everyscope.activations.shards.verify import verify_shard
from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_bytes
from everyscope.base.progress import say


def take_away_damage(folders: tuple[Path, ...]) -> None:
    """Read all shards of `folders`, and delete those that differ from their records.

    A shard without manifest is held against its sidecar. Manifests and statistics that do not follow from the rest go too.
    """
    damaged = sum(_take_away(folder) for folder in folders)
    say(f"  repair: shards to be rewritten: {damaged}" if damaged else "  repair: every shard is what was written")


def _take_away(folder: Path) -> int:
    manifest, shards = _manifest(folder), sorted(folder.glob("shard_*.safetensors"))
    damaged = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for shard, error in zip(shards, pool.map(lambda shard: _error(shard, manifest), shards), strict=True):
            if error is not None:
                say(f"  repair: {_complaint(error)}")
                shard.unlink(missing_ok=True)
                sidecar_path(shard).unlink(missing_ok=True)
                damaged += 1
    if not damaged and manifest is not None and not _agrees(folder, manifest):
        say(f"  repair: {folder / STATISTICS} does not follow from the shards")
        (folder / STATISTICS).unlink(missing_ok=True)
    return damaged


def _manifest(folder: Path) -> Manifest | None:
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return read_manifest(folder)
    except DataError as error:
        say(f"  repair: {_complaint(error)}")
        (folder / MANIFEST).unlink()
        return None


def _complaint(error: DataError) -> str:
    """What is wrong, without the remedy, which is under way."""
    return str(error).rpartition(";")[0] or str(error)


def _error(shard: Path, manifest: Manifest | None) -> DataError | None:
    entries = {entry.file: entry for entry in manifest.shards} if manifest is not None else {}
    try:
        if manifest is not None and shard.name in entries:
            verify_shard(shard, entries[shard.name], manifest)
        elif sidecar_path(shard).is_file():
            record = read_sidecar(shard)
            found = checksums_of(shard)
            if (found.sha256, found.xxh3) != (record.sha256, record.xxh3):
                raise DamagedData(f"{shard}: differs from its checksum")
    except DataError as error:
        return error
    return None


def _agrees(folder: Path, manifest: Manifest) -> bool:
    def records() -> Iterator:
        for entry in manifest.shards:
            if sidecar_path(folder / entry.file).is_file():
                yield read_sidecar(folder / entry.file)

    sums = merged_sums(records())
    if sums is None:
        return True
    return (folder / STATISTICS).is_file() and read_bytes(folder / STATISTICS) == statistics_bytes(sums)
