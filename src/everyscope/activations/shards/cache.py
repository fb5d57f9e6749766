"""Blocks from elsewhere, kept on this machine's disk: one file a block, by the checksum of its shard.

Blocks are checked when read, so a file torn by a crash or changed by somebody is no danger: it is deleted and
fetched again. Several processes may share a folder. Nothing here must succeed: where the disk is full, blocks are not kept.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from everyscope.base.files import PARTIAL

CACHE_BYTES = 10 << 30
"""Room that blocks may take by default [bytes]."""
SCAN_SHARE = 16
"""The folder is measured, and the oldest blocks deleted, whenever this process has added such a part of its room."""


def default_cache_folder() -> Path:
    """$EVERYSCOPE_CACHE, or `everyscope` in the user's folder for caches."""
    given = os.environ.get("EVERYSCOPE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everyscope"


class BlockCache:
    """Files of at most `max_bytes` in all; each further process that adds some may exceed that by a sixteenth."""

    def __init__(self, folder: Path, max_bytes: int = CACHE_BYTES) -> None:
        """Touches no disk yet."""
        self._folder, self._max_bytes = folder, max_bytes
        self._room = 0
        self._lock = threading.Lock()

    def get(self, key: str, is_right: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """The block kept as `key`, as uint8 [bytes]; None where there is none, or a wrong one, which is deleted."""
        path = self._path(key)
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError:
            return None
        if not is_right(data):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # the last use; if the clock is wrong, another block than the oldest may go
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep a block, if there is room for it."""
        if len(data) > self._max_bytes:
            return
        with self._lock:
            if self._room < len(data):
                self._room = self._make_room(len(data))
            self._room -= len(data)
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _make_room(self, wanted: int) -> int:
        """Delete the blocks used longest ago until some room is free; bytes that may be added before the next time."""
        found = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        used = sum(size for _, size, _ in found)
        room = max(wanted, self._max_bytes // SCAN_SHARE)
        for _, size, path in sorted(found):
            if used + room <= self._max_bytes:
                break
            with suppress(OSError):
                path.unlink()
                used -= size
        return min(room, self._max_bytes - used)
