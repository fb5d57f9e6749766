"""Reading every byte of finished shards once and comparing it with what was recorded when it was written."""

from pathlib import Path

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import PARTIAL, read_json, sha256
from everyscope.shards.checksums import checksums_of
from everyscope.shards.format import open_shard
from everyscope.shards.manifest import (
    MANIFEST,
    STATISTICS,
    ShardEntry,
    ShardRecord,
    read_manifest,
    read_sidecar,
    sidecar_path,
)
from everyscope.shards.statistics import Sums

REMEDY = "delete it and run the same harvest again"


def verify_shards(folder: Path) -> None:
    """Check a site's folder, or all folders below `folder`.

    DamagedData names the first file, and block of 4 MiB, that is not what was written; DataError where shards have no
    manifest, because their harvest has not finished, or where there are none.
    """
    shards = sorted(
        {path.parent for path in folder.rglob("shard_*.safetensors")} | {path.parent for path in folder.rglob(MANIFEST)}
    )
    if not shards:
        raise DataError(f"{folder}: holds no shards; give a folder that `everyscope harvest` wrote")
    for site_folder in shards:
        _verify_folder(site_folder)


def _verify_folder(folder: Path) -> None:
    manifest = read_manifest(folder)
    expected = {name for entry in manifest.shards for name in (entry.file, sidecar_path(folder / entry.file).name)}
    for path in sorted(folder.glob("shard_*")):
        if path.name not in expected and not path.name.endswith(PARTIAL):
            raise DamagedData(f"{path}: is not in the manifest; delete it, or harvest into a folder of its own")
    sums = None
    for entry in manifest.shards:
        record = _verify_shard(folder / entry.file, entry)
        if (record.d_in, record.dtype) != (manifest.d_in, manifest.dtype):
            raise DamagedData(f"{folder / entry.file}: its sidecar and {MANIFEST} disagree about d_in or dtype; harvest again")
        if record.statistics is not None:
            sums = sums or Sums(record.d_in, len(record.statistics.position_count))
            sums.merge(Sums.of_record(record.statistics))
    if manifest.num_rows != sum(entry.rows for entry in manifest.shards):
        raise DamagedData(f"{folder / MANIFEST}: num_rows={manifest.num_rows} is not the sum of its shards; {REMEDY}")
    if sums is not None and read_json(folder / STATISTICS) != sums.statistics().as_json():
        raise DamagedData(f"{folder / STATISTICS}: does not follow from the shards' sums; {REMEDY}")


def _verify_shard(path: Path, entry: ShardEntry) -> ShardRecord:
    sidecar = sidecar_path(path)
    if not sidecar.is_file() or sha256(sidecar) != entry.sidecar_sha256:
        raise DamagedData(f"{sidecar}: missing, or differs from its checksum in {MANIFEST}; delete {path.name} and harvest again")
    record = read_sidecar(path)
    if (record.file, record.rows, record.num_bytes, record.sha256) != (entry.file, entry.rows, entry.num_bytes, entry.sha256):
        raise DamagedData(f"{sidecar}: disagrees with {MANIFEST}; delete {path.name} and harvest again")
    if path.is_file() and path.stat().st_size == record.num_bytes:
        got = checksums_of(path)
        for block, (found, recorded) in enumerate(zip(got.xxh3, record.xxh3, strict=True)):
            if found != recorded:
                raise DamagedData(f"{path}: block {block} of 4 MiB differs from its checksum; {REMEDY}")
        if got.sha256 != record.sha256:
            raise DamagedData(f"{path}: SHA-256 is {got.sha256}, recorded {record.sha256}; {REMEDY}")
    open_shard(path, record.layout)
    return record
