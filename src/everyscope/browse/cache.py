"""Where a suite's index lies, and when it is stale.

An index lies in the user's cache folder, never in the suite, which may be read-only or shared: one folder per suite, in it a
database for each part in each of its states. The name holds a hash of the part's entry in suite.json and of the size and time of
each file that is read, so a stale database is simply one that nobody asks for. It is written under another name and renamed; a
lock lets a second reader wait for the first instead of building the same again, and dies with its holder.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from everyscope.base.errors import StorageError
from everyscope.base.files import PARTIAL, make_folder, whole_file
from everyscope.base.ids import content_id
from everyscope.browse.tables import VERSION

SUFFIX = ".sqlite"


def cache_folder(given: Path | None) -> Path:
    """Where indexes go unless `given` says otherwise."""
    if given is not None:
        return given
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "everyscope" / "browse"


def part_path(folder: Path, name: str, state: dict[str, Any], inputs: list[Path]) -> Path:
    """Where the database of a part lies in a suite's `folder` of indexes, built or not, in the present state of its `inputs`.

    `state` is what else it is made of.
    """
    stamps = [(path.name, path.stat()) for path in inputs if path.is_file()]
    files = [[name, stamp.st_size, stamp.st_mtime_ns] for name, stamp in stamps]
    return folder / (content_id({"version": VERSION, "name": name, "state": state, "inputs": files}) + SUFFIX)


def suite_cache(suite: Path, cache: Path | None) -> Path:
    """The folder of all of a suite's databases."""
    return cache_folder(cache) / content_id(str(suite.resolve()))


def ensure(path: Path, build: Callable[[Path], None]) -> None:
    """Ensure that the database `path` exists: `build` writes it if it is missing. StorageError where that fails."""
    if path.exists():
        return
    try:
        with _locked(path):
            if not path.exists():  # another process or thread may have built it while we waited
                path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
                with whole_file(path) as partial:
                    build(partial)
    except StorageError as error:
        raise StorageError(f"{str(error).split(';')[0]}; choose another folder for the index with --cache DIR") from error


def remove_stale(paths: list[Path]) -> None:
    """Delete a suite's databases that are none of `paths`. A process that still reads one keeps it until it closes it."""
    folder, kept = paths[0].parent, {path.stem for path in paths}
    for other in folder.glob("*"):
        if other.name.partition(".")[0] not in kept:
            with suppress(OSError):  # systems that do not let go of open files keep it until next time
                other.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one database, waiting for its present holder."""
    make_folder(path.parent)
    try:
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be written ({error.strerror}); ") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
