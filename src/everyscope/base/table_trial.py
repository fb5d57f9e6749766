"""Tables that anybody may have made, read first in a process of its own.

A checksum reveals accidents, and nothing of what a stranger wrote on purpose. Such a file may crash Arrow and the
whole process with it, or unpack without end: then it ends that process alone, within limits of time and memory. What it reads to
the end can be read again.

Run as `python -m everyscope.base.table_trial`: paths as a JSON list on standard input; on standard output READY and then a line
for each, its fault as a JSON string or null.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow

from everyscope.base.errors import DamagedData, DataError, EveryscopeError, first_line
from everyscope.base.files import human_bytes
from everyscope.base.tables import UNREADABLE, opened_table

READY = "ready"
ROWS = 256
"""Read at once, as those do who read such tables batch by batch [rows]."""
MAX_BATCH_BYTES = 1 << 27
"""What ROWS rows may take; those of a described suite take some megabytes [bytes]."""
MAX_BYTES = 4 << 30
"""What the process may take beside what it begins with [bytes]."""
LEAST_SECONDS, BYTES_PER_SECOND = 60, 1 << 20
"""A file may take so long at least [s], and so long by its size [bytes/s]; a hundredth of that is usual."""
MAX_DEATHS = 8
"""Processes that a suite may end before its other tables are not tried any more."""


class Tried:
    """Which of some tables can be read."""

    def __init__(self, paths: Sequence[Path], remedy: str) -> None:
        """Try them all. EveryscopeError where no process can be started."""
        self._remedy = remedy
        self._faults: dict[Path, str] = {}
        left, deaths = list(paths), 0
        while left:
            if deaths == MAX_DEATHS:
                self._faults |= dict.fromkeys(left, f"not read, for {deaths} other files ended the process that reads them")
                break
            faults, death = _tried(left)
            self._faults |= {path: fault for path, fault in zip(left, faults, strict=False) if fault is not None}
            if len(faults) < len(left):
                self._faults[left[len(faults)]] = death
                deaths += 1
            left = left[len(faults) + 1 :]

    def require(self, path: Path) -> None:
        """DamagedData where the trial of `path` failed."""
        if path in self._faults:
            raise DamagedData(f"{path}: {self._faults[path]}; {self._remedy}")


def _tried(paths: Sequence[Path]) -> tuple[list[str | None], str]:
    """The faults of the first paths, and what the next one, if there is one, did to the process."""
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve much more room than they fill
    ended = subprocess.run(
        [sys.executable, "-m", "everyscope.base.table_trial"],
        input=json.dumps([str(path) for path in paths]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        check=False,
    )
    ready, *lines = ended.stdout.splitlines() or [""]
    if ready != READY:
        raise EveryscopeError(
            f"{sys.executable}: a process that tries a suite's tables ended with {ended.returncode} before it began; "
            "is there enough memory?"
        )
    if ended.returncode == -signal.SIGALRM:
        return [json.loads(line) for line in lines], "takes far longer to read than its size explains"
    died = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"code {ended.returncode}"
    return [json.loads(line) for line in lines], f"ends the process that reads it ({died})"


def main() -> None:
    """Try the paths on standard input."""
    paths = [Path(path) for path in json.loads(sys.stdin.read())]
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))
    pyarrow.set_cpu_count(1)
    print(READY, flush=True)
    for path in paths:
        with contextlib.suppress(OSError):
            signal.alarm(LEAST_SECONDS + path.stat().st_size // BYTES_PER_SECOND)
        print(json.dumps(fault(path)), flush=True)


def fault(path: Path) -> str | None:
    """What is wrong with a table, all of whose columns are read and every offset compared; None where nothing is."""
    try:
        for batch in opened_table(path, "").iter_batches(ROWS, use_threads=False):
            batch.validate(full=True)
            if batch.nbytes > MAX_BATCH_BYTES:
                return f"{ROWS} of its rows take more than {human_bytes(MAX_BATCH_BYTES)} in memory"
    except DataError as error:
        return str(error).removeprefix(f"{path}: ").rstrip("; ")
    except UNREADABLE as error:
        return f"cannot be read as Parquet ({first_line(error)[:150]})"
    return None


if __name__ == "__main__":
    main()
