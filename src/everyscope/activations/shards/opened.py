"""Where the bytes of a folder of shards come from: one small protocol, and files on this machine behind it.

Whatever the storage, what a `window` shows has passed its block's checksum.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from everyscope.activations.shards.checksums import BLOCK_BYTES, block_checksum
from everyscope.activations.shards.format import open_shard
from everyscope.activations.shards.manifest import REMEDY, ShardRecord
from everyscope.base.errors import DamagedData
from everyscope.base.files import read_bytes


class OpenShard(Protocol):
    """One shard, open for reading by several threads."""

    def fetch(self, block: int) -> None:
        """Bring one block of 4 MiB near, and check it if that has not been done; DamagedData, naming file and block."""
        ...

    def window(self, start: int, stop: int) -> UInt8[np.ndarray, " bytes"]:
        """The file's bytes from `start` to `stop` (excluded), checked. To read from, and no longer than it is held."""
        ...


class Folder(Protocol):
    """The files of one folder of shards."""

    @property
    def location(self) -> str:
        """The folder's path or address."""
        ...

    @property
    def num_readers(self) -> int:
        """Blocks that are best fetched at once."""
        ...

    def is_near(self, file: str, block: int) -> bool:
        """Whether to fetch a block of a shard ahead of its reading would gain nothing."""
        ...

    def read(self, file: str) -> bytes:
        """All of a small file; DataError where there is none."""
        ...

    def open(self, record: ShardRecord) -> OpenShard:
        """The shard that a sidecar describes; DamagedData where it is missing or is not that."""
        ...


class LocalFolder:
    """Files on this machine, mapped: many processes that read one folder share the page cache."""

    num_readers = 1

    def __init__(self, path: Path) -> None:
        """Opens nothing yet."""
        self._path = path
        self._checked: dict[str, tuple[int, np.ndarray]] = {}

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self._path)

    def is_near(self, file: str, block: int) -> bool:
        """True for what was checked: should the system have dropped it since, its own reading ahead of a map brings it back."""
        known = self._checked.get(file)
        return known is not None and bool(known[1][block])

    def read(self, file: str) -> bytes:
        """All of a small file; DataError where there is none."""
        return read_bytes(self._path / file)

    def open(self, record: ShardRecord) -> "MappedShard":
        """Map a shard. What was checked before it was closed need not be checked again, unless it is another file now."""
        path = self._path / record.file
        raw = open_shard(path, record.layout)
        inode, known = path.stat().st_ino, self._checked.get(record.file)
        checked = known[1] if known is not None and known[0] == inode else np.zeros(len(record.xxh3), bool)
        self._checked[record.file] = (inode, checked)
        return MappedShard(path, raw, record, checked)


class MappedShard:
    """A file in memory as the system maps it; each block is checked the first time that this process touches it."""

    def __init__(self, path: Path, raw: np.ndarray, record: ShardRecord, checked: np.ndarray) -> None:
        """Made by `LocalFolder.open`; `checked` tells for each block whether it has been, and is kept up."""
        self._path, self._raw, self._record, self._checked = path, raw, record, checked

    def fetch(self, block: int) -> None:
        """Check one block, which brings it into memory; DamagedData, naming file and block."""
        if not self._checked[block]:
            self._check(block)

    def window(self, start: int, stop: int) -> UInt8[np.ndarray, " bytes"]:
        """The mapped bytes themselves, without a copy."""
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not self._checked[block]:
                self._check(block)
        return self._raw[start:stop]

    def _check(self, block: int) -> None:
        if block_checksum(self._raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != self._record.xxh3[block]:
            raise DamagedData(f"{self._path}: block {block} of 4 MiB differs from its checksum; {REMEDY}")
        self._checked[block] = True
