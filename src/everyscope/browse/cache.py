"""Where a suite's index lies, and when it is stale.

An index lies in the user's cache folder, never in the suite, which may be read-only or shared: one folder per suite, in it one
file per state of the suite. The name holds a hash of suite.json and of the size and time of each file that is read, so a stale
index is simply one that nobody asks for. It is written under another name and renamed; a lock lets a second reader wait for the
first instead of building the same again, and dies with its holder.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from everyscope.base.errors import StorageError
from everyscope.base.files import PARTIAL, make_folder, sha256, whole_file
from everyscope.base.ids import content_id
from everyscope.browse.tables import VERSION
from everyscope.suite.layout import INDEX_FILE

SUFFIX = ".sqlite"


def cache_folder(given: Path | None) -> Path:
    """Where indexes go unless `given` says otherwise."""
    if given is not None:
        return given
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "everyscope" / "browse"


def index_path(suite: Path, inputs: list[Path], cache: Path | None) -> Path:
    """Where the index of `suite` lies, built or not, in its present state; `inputs` are the files read besides suite.json."""
    stamps = [(path.relative_to(suite).as_posix(), path.stat()) for path in inputs if path.is_file()]
    state = {
        "version": VERSION,
        "index": sha256(suite / INDEX_FILE),
        "inputs": [[name, stamp.st_size, stamp.st_mtime_ns] for name, stamp in stamps],
    }
    return cache_folder(cache) / content_id(str(suite.resolve())) / (content_id(state) + SUFFIX)


def ensure_index(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, after `build` has written it if it was missing; other indexes of the same suite are then removed.

    StorageError where the cache cannot be written.
    """
    if path.exists():
        return path
    try:
        with _locked(path):
            if not path.exists():  # another process may have built it while we waited
                path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
                with whole_file(path) as partial:
                    build(partial)
                _remove_stale(path)
    except StorageError as error:
        raise StorageError(f"{str(error).split(';')[0]}; choose another folder for the index with --cache DIR") from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one suite's indexes, waiting for whoever has it."""
    make_folder(path.parent)
    try:
        lock = (path.parent / "lock").open("w")
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be written ({error.strerror}); ") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_stale(path: Path) -> None:
    """Delete the suite's other indexes. Whoever still reads one keeps it until they close it."""
    for other in path.parent.glob(f"*{SUFFIX}"):
        if other != path:
            with suppress(PermissionError):  # systems that do not let go of open files keep it until next time
                other.unlink()
