"""Checksums of a shard: SHA-256 of the file, for anyone; xxh3 of each block, fast enough to check at every first read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 4 << 20
"""Bytes that one xxh3 covers, header included; the file's last block may be shorter [bytes]."""


@dataclass(frozen=True)
class Checksums:
    """What a shard's bytes must hash to."""

    sha256: str
    xxh3: tuple[str, ...]


def block_checksum(block: bytes | memoryview) -> str:
    """The xxh3 (64 bits) of one block's bytes, in hexadecimal."""
    return xxhash.xxh3_64(block).hexdigest()


def checksums_of(path: Path) -> Checksums:
    """Both checksums of a file, read once."""
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(block_checksum(block))
    return Checksums(whole.hexdigest(), tuple(blocks))
