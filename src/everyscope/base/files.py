"""Files that are either whole or absent: written under a temporary name, synced, then renamed.

A temporary file ends in `.partial`; the owner of a folder may delete such files, for no finished file has that name.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from everyscope.base.errors import DamagedData, DataError, StorageError, first_line
from everyscope.base.ids import IDENTITY, content_id

PARTIAL = ".partial"
FILE_MODE = 0o644
"""Permissions of every finished file."""
MAX_JSON_BYTES = 1 << 28
"""The largest JSON file that is read: a larger one is no file of ours [bytes]."""
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
"""What a path may be that is no file, by the test that tells so."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's complaint about `path` into a StorageError that says how to fix it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{path}: the disk is full; free some space or choose another folder with --out"
        elif error.errno == errno.EFBIG:
            message = f"{path}: file size limit exceeded; raise the limit (ulimit -f) or choose another disk with --out"
        elif error.errno == errno.EIO:
            message = f"{path}: the disk fails to read or write (input/output error); choose another one with --out"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{path}: no permission to write here; choose another folder with --out"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            message = f"{path}: a file is where a folder is needed (or the reverse); choose another folder with --out"
        else:
            raise
        raise StorageError(message) from error


def make_folder(path: Path) -> Path:
    """Create `path` with its parents and return it; StorageError where that is not allowed."""
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # the parents exist or were made: this file system makes no folders, as /proc
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
    """Sync `path` to the disk."""
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


def require_file(path: Path) -> None:
    """DataError unless `path` is a regular file, through links: reading a pipe waits for ever, and a device may never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file; is this the right folder, and did the stage before it finish?") from error
    except OSError as error:
        raise _not_readable(path, error) from error
    except ValueError as error:  # a NUL character in the name
        raise DataError(f"{str(path)!r}: {error}; give the path of a file") from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS.items() if test(mode)), "something else")
        raise DataError(f"{path}: is {kind}, expected a file; delete it, and download or make the file again")


def _not_readable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); change its permissions or choose another folder")


def read_bytes(path: Path, at_most: int | None = None) -> bytes:
    """All bytes of `path`; DataError where it is missing, is no file, cannot be read or has more than `at_most` [bytes]."""
    require_file(path)
    try:
        with path.open("rb") as file:
            data = file.read() if at_most is None else file.read(at_most + 1)
    except OSError as error:
        raise _not_readable(path, error) from error
    if at_most is not None and len(data) > at_most:
        raise DataError(f"{path}: is larger than {human_bytes(at_most)}, which no such file should be; is it the right one?")
    return data


def foreign_kind(head: bytes) -> str | None:
    """What a file is that begins with `head`, and what to do, where a download left something else than the file asked for."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download the file again"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is an HTML page, not the file itself; download it again, from the address of the file and signed in if need be"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle, which may run code and is never read; save the arrays as npz or safetensors"
    return None


def unreadable(path: Path, form: str, error: BaseException | str, remedy: str = "download or publish it again") -> DamagedData:
    """What to raise where a library cannot read `path` as `form`: what the file is instead, or the library's first words."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if (kind := foreign_kind(file.read(64))) is not None:
            return DamagedData(f"{path}: {kind}")
    reason = first_line(error) if isinstance(error, BaseException) else error
    return DamagedData(f"{path}: cannot be read as {form} ({reason[:150]}); {remedy}")


def parse_json(data: bytes, name: Path | str) -> Any:
    """The JSON value that `data` spells; DataError, which calls the data `name`, where it spells none."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if (kind := foreign_kind(data[:64])) is not None:
            raise DataError(f"{name}: {kind}") from error
        raise DataError(
            f"{name}: not readable as JSON ({first_line(error)[:150]}); download it, or run its stage, again"
        ) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; DataError where the file is missing, no JSON or larger than MAX_JSON_BYTES."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def parse_object(data: bytes, name: Path | str) -> dict[str, Any]:
    """The JSON object that `data` spells; DataError where it spells another value, or as `parse_json` raises."""
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise DataError(f"{name}: holds {type(value).__name__}, expected a JSON object; download it, or run its stage, again")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; DataError where it holds another value, or as `read_json` raises."""
    return parse_object(read_bytes(path, MAX_JSON_BYTES), path)


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON together with its identity, by which `read_sealed` knows every later change."""
    write_json(path, value | {IDENTITY: content_id(value)})


def read_sealed(path: Path, remedy: str = "download it, or run its stage, again") -> dict[str, Any]:
    """What `write_sealed` wrote; DamagedData where the identity is not that of the content, or as `read_object` raises."""
    return unsealed(read_object(path), path, remedy)


def unsealed(value: dict[str, Any], name: Path | str, remedy: str) -> dict[str, Any]:
    """A sealed object without its identity; DamagedData, which calls it `name`, where the identity is not that of the rest."""
    content = {key: item for key, item in value.items() if key != IDENTITY}
    try:
        want = content_id(content)
    except ValueError:  # a number beyond a float's range was read as infinity
        want = "a number in range"
    if (got := value.get(IDENTITY)) != want:
        raise DamagedData(
            f"{name}: its identity is {str(got)[:16]!r}, that of its content {want!r}: it was changed, or is of another version; "
            f"{remedy}"
        )
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; DataError where it is missing or no file."""
    require_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _not_readable(path, error) from error


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
