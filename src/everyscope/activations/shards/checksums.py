"""Checksums of a shard: SHA-256 of the file, for anyone; xxh3 of each block, fast enough to check at every first read."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

BLOCK_BYTES = 4 << 20
"""Bytes that one xxh3 covers, header included; the file's last block may be shorter [bytes]."""
AHEAD_BYTES = 8 * BLOCK_BYTES
"""How far before its checking the operating system is asked to fetch a file [bytes]."""


@dataclass(frozen=True)
class Checksums:
    """What a shard's bytes must hash to."""

    sha256: str
    xxh3: tuple[str, ...]


def block_checksum(block: bytes | np.ndarray) -> str:
    """The xxh3 (64 bits) of one block's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(block if isinstance(block, bytes) else block.data)


class Hasher:
    """Both checksums of bytes that come in order, in pieces of any size. Hashing leaves the interpreter's lock to others."""

    def __init__(self) -> None:
        """Nothing hashed yet."""
        self._whole, self._blocks = hashlib.sha256(), []
        self._block, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Count in the next bytes. Each block is hashed twice in a row, so that the second time it comes from the cache."""
        while len(data):
            piece, data = data[: self._room], data[self._room :]
            self._whole.update(piece)
            self._block.update(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._close_block()

    def checksums(self) -> Checksums:
        """What all bytes so far hash to; the hasher is used up."""
        if self._room < BLOCK_BYTES:
            self._close_block()
        return Checksums(self._whole.hexdigest(), tuple(self._blocks))

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block, self._room = xxhash.xxh3_64(), BLOCK_BYTES


def checksums_of(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> Checksums:
    """Both checksums of a file, read once, a block at a time; `advance` is called with the bytes done.

    The system is asked for what comes next (POSIX_FADV_WILLNEED), so that the disk reads while the processor hashes.
    """
    hasher, buffer, done = Hasher(), bytearray(BLOCK_BYTES), 0
    with path.open("rb", buffering=0) as file:
        while True:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), done + BLOCK_BYTES, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            count = file.readinto(buffer)
            if not count:
                return hasher.checksums()
            hasher.update(memoryview(buffer)[:count])
            done += count
            advance(count)
