"""Files that are either whole or absent: written under a temporary name, synced, then renamed.

A temporary file ends in `.partial`; whoever owns a folder may delete such files, for no finished file has that name.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from everyscope.base.errors import DataError, StorageError

PARTIAL = ".partial"
FILE_MODE = 0o644
"""Permissions of every finished file."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's complaint about `path` into a StorageError that says how to mend it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{path}: the disk is full; free some space or choose another folder with --out"
        elif error.errno == errno.EFBIG:
            message = f"{path}: files may not grow this large here; raise the limit (ulimit -f) or choose another disk with --out"
        elif error.errno == errno.EIO:
            message = f"{path}: the disk fails to read or write (input/output error); choose another one with --out"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{path}: no permission to write here; choose a folder of yours with --out"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            message = f"{path}: a file stands where a folder is needed (or the reverse); choose another folder with --out"
        else:
            raise
        raise StorageError(message) from error


def make_folder(path: Path) -> Path:
    """Create `path` with its parents and return it; StorageError where that is not allowed."""
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # the parents are there or made: this file system makes no folders, as /proc
            raise PermissionError(errno.EACCES, "no folders can be made here") from error
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, on failure delete it."""
    make_folder(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with storage_errors(path):
            yield partial
            partial.chmod(FILE_MODE)  # some writers make files that nobody else may read
            sync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def reserve(file: IO[bytes], num_bytes: int) -> None:
    """Give an open file its full size, and take its room on the disk now; OSError where there is none.

    A page of a sparse file that finds no room later, when it is written through a map, kills the process with SIGBUS.
    """
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:
        file.truncate(num_bytes)


def sync(path: Path) -> None:
    """Ask the disk to hold `path` before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused, for they are no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: Path) -> bytes:
    """All bytes of `path`; DataError where the file is missing or cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file; is this the right folder, and did the stage before it finish?") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions or choose another folder") from error


def parse_json(data: bytes, name: Path | str) -> Any:
    """The JSON value that `data` spells; DataError, which calls the data `name`, where it spells none."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not readable as JSON ({error}); delete it and run the same command again") from error


def read_json(path: Path) -> Any:
    """The JSON value in `path`; DataError where the file is missing or no JSON."""
    return parse_json(read_bytes(path), path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, num_bytes: int, purpose: str) -> None:
    """StorageError unless the disk under `folder`, which need not exist yet, has `num_bytes` free [bytes]."""
    standing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(standing).free
    if num_bytes > free:
        raise StorageError(
            f"{folder}: {purpose} needs {human_bytes(num_bytes)} but only {human_bytes(free)} are free; "
            "free some space, choose another folder with --out, or harvest fewer tokens or sites"
        )


def human_bytes(num_bytes: float) -> str:
    """`num_bytes` in the largest binary unit that leaves at least one digit before the point, as in 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} PiB"
