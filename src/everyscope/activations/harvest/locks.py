"""Who may write into a harvest's folder: any number of processes, each a partition of its own, all of one mind.

    gate.lock                 held for moments: to come, to go, to seal
    partition_0_of_3.lock     held while that partition is being written; inside, what its process means to write

Both are locked with flock, which ends with its process, and are gone when nobody writes. One that a killed process left is
known by its not being locked. Times play no part.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from everyscope.base.errors import StorageError
from everyscope.base.files import make_folder, storage_errors

GATE = "gate.lock"
Partition = tuple[int, int]
"""(index, count)."""


@contextmanager
def gate(folder: Path) -> Iterator[None]:
    """Wait until no other process comes, goes or seals here, and keep them from it."""
    make_folder(folder)
    path = folder / GATE
    with storage_errors(folder):
        descriptor = _open(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        while not _is_at(descriptor, path):  # its holder deleted it
            os.close(descriptor)
            descriptor = _open(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def writing(
    folder: Path, partition: Partition, purpose: str, admit: Callable[[bool], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Write one partition; StorageError where another process writes it, or cuts the folder otherwise, or has another purpose.

    `admit` is called at the gate, before anything is written, and learns whether others are writing; `leave` at the gate, on the
    way out, if nobody else is left.
    """
    with gate(folder):
        others = partitions_at_work(folder)
        _refuse(folder, partition, purpose, others)
        admit(bool(others))
        path = _path(folder, partition)
        with storage_errors(folder):
            descriptor = _open(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.truncate(descriptor, 0)
            os.write(descriptor, purpose.encode())
    try:
        yield
    finally:
        with gate(folder):
            path.unlink(missing_ok=True)
            os.close(descriptor)
            if not partitions_at_work(folder):
                leave()


def clear(folder: Path) -> None:
    """Delete what killed processes have left."""
    if any(folder.glob("*.lock")):
        with gate(folder):
            partitions_at_work(folder)


def partitions_at_work(folder: Path) -> dict[Partition, str]:
    """The partitions that are being written, with their purposes. At the gate only; deletes locks that nobody holds."""
    found = {}
    for path in sorted(folder.glob("partition_*_of_*.lock")):
        named = re.fullmatch(r"partition_(\d+)_of_(\d+)\.lock", path.name)
        if named is None:
            continue
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            found[int(named[1]), int(named[2])] = path.read_text()
        finally:
            os.close(descriptor)
    return found


def _refuse(folder: Path, partition: Partition, purpose: str, others: dict[Partition, str]) -> None:
    index, count = partition
    remedy = "wait for it, or choose another folder with --out"
    if partition in others:
        which = "here" if count == 1 else f"partition {index} of {count} here"
        raise StorageError(f"{folder}: another harvest is writing {which}; {remedy}")
    for _, other_count in others:
        if other_count != count:
            raise StorageError(f"{folder}: another harvest is writing here in {other_count} partitions, not {count}; {remedy}")
    if any(other != purpose for other in others.values()):
        raise StorageError(f"{folder}: another harvest is writing here with another config; {remedy}")


def _path(folder: Path, partition: Partition) -> Path:
    return folder / f"partition_{partition[0]}_of_{partition[1]}.lock"


def _open(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o644)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
