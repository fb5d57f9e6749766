"""Shards that lie elsewhere, read by whole blocks: those to come are fetched while earlier ones are used, and kept on disk.

A block counts only when its checksum is right, from the wire as from the cache. Memory: `MEMORY_BLOCKS` blocks a folder.
"""

import re
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
from jaxtyping import UInt8

from everyscope.activations.shards.cache import BlockCache, default_cache_folder
from everyscope.activations.shards.checksums import BLOCK_BYTES, block_checksum
from everyscope.activations.shards.manifest import ShardRecord
from everyscope.activations.shards.transports import Patience, Transport, patiently, transport_of
from everyscope.base.errors import DamagedData, DataError

MEMORY_BLOCKS = 32
"""Blocks of a folder that are held in memory [blocks]."""
READERS = 4
"""Blocks that are fetched at once."""


def is_address(location: str) -> bool:
    """Whether `location` is an address such as s3://bucket/folder, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def remote_folder(address: str) -> "RemoteFolder":
    """The folder at `address`, with the user's cache and the default time limits. MissingExtra, ConfigError."""
    return RemoteFolder(address, transport_of(address), BlockCache(default_cache_folder()), Patience())


class RemoteFolder:
    """The files of a folder behind a transport."""

    num_readers = READERS

    def __init__(self, address: str, transport: Transport, cache: BlockCache, patience: Patience) -> None:
        """Asks for nothing yet."""
        self.location = address.rstrip("/")
        self._transport, self._cache, self._patience = transport, cache, patience
        self._blocks: OrderedDict[str, np.ndarray] = OrderedDict()
        self._fetching: dict[str, Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    def is_near(self, file: str, block: int) -> bool:
        """False: a fetch looks first into memory and cache."""
        return False

    def read(self, file: str) -> bytes:
        """All of a small file; DataError where there is none, StorageError where it cannot be read."""
        return self._asked(file, 0, None)

    def open(self, record: ShardRecord) -> "RemoteShard":
        """The shard that a sidecar describes. Nothing is fetched before it is read."""
        return RemoteShard(self, record)

    def block(self, record: ShardRecord, index: int) -> UInt8[np.ndarray, " bytes"]:
        """One block of a shard, checked, from memory, disk or afar. Threads that want the same one share one fetching."""
        key = f"{record.sha256}-{index}"
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            theirs = self._fetching.get(key)
            mine = self._fetching[key] = Future() if theirs is None else theirs
        if theirs is not None:
            return theirs.result()
        try:
            data = self._load(record, index, key)
        except BaseException as error:
            with self._lock:
                del self._fetching[key]
            mine.set_exception(error)
            raise
        with self._lock:
            self._blocks[key] = data
            if len(self._blocks) > MEMORY_BLOCKS:
                self._blocks.popitem(last=False)
            del self._fetching[key]
        mine.set_result(data)
        return data

    def _load(self, record: ShardRecord, index: int, key: str) -> np.ndarray:
        def is_right(data: np.ndarray | bytes) -> bool:
            return block_checksum(data) == record.xxh3[index]

        kept = self._cache.get(key, is_right)
        if kept is not None:
            return kept
        start, stop = index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, record.num_bytes)
        for _ in range(2):  # what came damaged over the wire is asked for once more
            data = self._shard_bytes(record.file, start, stop)
            if is_right(data):
                self._cache.put(key, data)
                return np.frombuffer(data, np.uint8)
        raise DamagedData(
            f"{self.location}/{record.file}: block {index} of 4 MiB differs from its checksum; copy it again from its harvest"
        )

    def _shard_bytes(self, file: str, start: int, stop: int) -> bytes:
        try:
            return self._asked(file, start, stop)
        except DamagedData:
            raise
        except DataError as error:
            raise DamagedData(f"{self.location}/{file}: the shard is missing; copy it from its harvest") from error

    def _asked(self, file: str, start: int, stop: int | None) -> bytes:
        def attempt(seconds: float) -> bytes:
            return self._transport.read(file, start, stop, seconds)

        return patiently(f"{self.location}/{file}", attempt, self._patience)


class RemoteShard:
    """One shard, by blocks."""

    def __init__(self, folder: RemoteFolder, record: ShardRecord) -> None:
        """Made by `RemoteFolder.open`."""
        self._folder, self._record = folder, record

    def fetch(self, block: int) -> None:
        """Fetch and check one block; DamagedData, DataError, StorageError."""
        self._folder.block(self._record, block)

    def window(self, start: int, stop: int) -> UInt8[np.ndarray, " bytes"]:
        """Bytes of one block without a copy, those of several put together."""
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if last - first == 1:
            return self._folder.block(self._record, first)[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]
        parts = np.empty(stop - start, np.uint8)
        for block in range(first, last):
            begin, end = max(start, block * BLOCK_BYTES), min(stop, (block + 1) * BLOCK_BYTES)
            data = self._folder.block(self._record, block)
            parts[begin - start : end - start] = data[begin - block * BLOCK_BYTES : end - block * BLOCK_BYTES]
        return parts
