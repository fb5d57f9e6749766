"""Reading every byte of finished shards once and comparing it with what was recorded when it was written.

Files are read side by side, one a core: SHA-256 takes longer than reading, and hashing leaves the interpreter to others.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from everyscope.activations.shards.checksums import checksums_of
from everyscope.activations.shards.format import open_shard
from everyscope.activations.shards.manifest import (
    MANIFEST,
    REMEDY,
    STATISTICS,
    Manifest,
    ShardEntry,
    ShardRecord,
    merged_sums,
    parse_sidecar,
    read_manifest,
    sidecar_path,
    statistics_bytes,
)
from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import PARTIAL, read_bytes
from everyscope.base.progress import meter

GIBIBYTE = 2**30
"""What progress counts in: a power of two, so that the parts sum to the whole exactly [bytes]."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Check:
    """One shard that is to be read."""

    path: Path
    entry: ShardEntry
    manifest: Manifest


def verify_shards(folder: Path, workers: int | None = None) -> None:
    """Check a site's folder, or all folders below `folder`, `workers` files at a time (None: one a core).

    DamagedData names the first file, and block of 4 MiB, that is not what was written; DataError where shards have no
    manifest, because their harvest has not finished, or where there are none.
    """
    folders = sorted(
        {path.parent for path in folder.rglob("shard_*.safetensors")} | {path.parent for path in folder.rglob(MANIFEST)}
    )
    if not folders:
        raise DataError(f"{folder}: holds no shards; give a folder that `everyscope harvest` wrote")
    checks = [check for site_folder in folders for check in _checks_of(site_folder)]
    total, lock = sum(check.entry.num_bytes for check in checks), threading.Lock()
    with meter("verify", total / GIBIBYTE, "GiB") as progress:

        def advance(num_bytes: int) -> None:
            with lock:
                progress.advance(num_bytes / GIBIBYTE)

        records = _in_order(checks, workers or os.cpu_count() or 1, advance)
        for site_folder in folders:
            _verify_statistics(site_folder, [next(records) for check in checks if check.path.parent == site_folder])


def verify_shard(path: Path, entry: ShardEntry, manifest: Manifest, advance: Advance = lambda num_bytes: None) -> ShardRecord:
    """Check one shard and its sidecar against the manifest; the sidecar. DamagedData names what is wrong."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise DamagedData(f"{sidecar}: the sidecar is missing; run the same harvest again")
    record = parse_sidecar(read_bytes(sidecar), entry, manifest, sidecar)
    if path.is_file() and path.stat().st_size == record.num_bytes:
        got = checksums_of(path, advance)
        if len(got.xxh3) != len(record.xxh3):
            raise DamagedData(f"{path}: has {len(got.xxh3)} blocks of 4 MiB, {len(record.xxh3)} expected; {REMEDY}")
        for block, (found, recorded) in enumerate(zip(got.xxh3, record.xxh3, strict=True)):
            if found != recorded:
                raise DamagedData(f"{path}: block {block} of 4 MiB differs from its checksum; {REMEDY}")
        if got.sha256 != record.sha256:
            raise DamagedData(f"{path}: SHA-256 is {got.sha256}, recorded {record.sha256}; {REMEDY}")
    open_shard(path, record.layout)
    return record


def _checks_of(folder: Path) -> list[_Check]:
    manifest = read_manifest(folder)
    expected = {name for entry in manifest.shards for name in (entry.file, sidecar_path(folder / entry.file).name)}
    for path in sorted(folder.glob("shard_*")):
        if path.name not in expected and not path.name.endswith(PARTIAL):
            raise DamagedData(f"{path}: is not in the manifest; finish the harvest that is running here, or delete it")
    return [_Check(folder / entry.file, entry, manifest) for entry in manifest.shards]


def _in_order(checks: list[_Check], workers: int, advance: Advance) -> Iterator[ShardRecord]:
    """The sidecars of shards that are whole, in order; so the first error is that of the first damaged shard."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda check: verify_shard(check.path, check.entry, check.manifest, advance), checks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _verify_statistics(folder: Path, records: list[ShardRecord]) -> None:
    sums = merged_sums(records)
    if sums is not None and read_bytes(folder / STATISTICS) != statistics_bytes(sums):
        raise DamagedData(f"{folder / STATISTICS}: does not follow from the shards' sums; {REMEDY}")
