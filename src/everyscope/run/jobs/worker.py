"""One job in a process of its own: `python -m everyscope.run.jobs.worker`, a Spec on standard input, events on standard output.

An event is a JSON object on a line, and the last one says how it ended:

    {"event": "started", "host": ..., "pid": ...}
    {"event": "units", "done": 1234}                    so far, those of earlier attempts included
    {"event": "done"} | {"event": "failed", "kind": "ConfigError", "given": [...], "is_final": true}
                      | {"event": "busy"} | {"event": "stopped"}

Whatever the job prints goes to standard error. When standard input ends, the parent of this process is gone, and it exits at
once: a job must not keep writing beside the attempt that replaces it.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from everyscope.base import errors
from everyscope.base.allocator import keep_freed_memory
from everyscope.base.errors import ConfigError, EveryscopeError, StorageError
from everyscope.base.files import storage_errors
from everyscope.base.signals import EXIT_CODE, leave_on_termination
from everyscope.run.jobs.job import Spec, call, config_of, work_of

TELL_SECONDS = 0.5
"""Between two events of units [s]."""
LOCK_SECONDS = 20.0
"""How long an earlier attempt, which is on its way out, is waited for [s]."""
LOCK_PAUSE = 0.1


class Report:
    """Events to the parent process."""

    def __init__(self, stream: TextIO) -> None:
        """Events go to `stream`, a line each."""
        self._stream, self._done, self._last_report, self._lock = stream, 0, 0.0, threading.Lock()

    def tell(self, event: str, **details: Any) -> None:
        """Write one event."""
        with self._lock:
            self._stream.write(json.dumps({"event": event} | details) + "\n")
            self._stream.flush()

    def units(self, count: int) -> None:
        """Count `count` more units, and report them now and then."""
        self._done += count
        if time.monotonic() - self._last_report >= TELL_SECONDS:
            self._last_report = time.monotonic()
            self.tell("units", done=self._done)

    def last_units(self) -> None:
        """Report what has not been reported yet."""
        if self._done:
            self.tell("units", done=self._done)


def main() -> None:
    """Run the job that standard input holds."""
    report = Report(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    line = sys.stdin.readline()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    leave_on_termination()
    keep_freed_memory()
    try:
        run(Spec.model_validate_json(line), report)
    except SystemExit as leaving:
        report.tell("stopped")
        sys.exit(leaving.code)


def run(spec: Spec, report: Report) -> None:
    """Do the work of a spec and report how it ended; SystemExit where it was asked to stop."""
    report.tell("started", host=socket.gethostname(), pid=os.getpid())
    try:
        if spec.version != (here := version("everyscope")):
            raise ConfigError(f"{socket.gethostname()}: has everyscope {here}, the run is of {spec.version}; install the same")
        torch.set_num_threads(spec.threads)
        work, config = work_of(spec), config_of(spec)
        with _held(spec.lock) as is_held:
            if not is_held:
                report.tell("busy")
                return
            call(work, config, report.units)
    except EveryscopeError as error:
        report.tell("failed", **as_event(error))
    except Exception as error:
        traceback.print_exc()
        report.tell(
            "failed", kind="EveryscopeError", given=[f"{type(error).__name__}: {errors.first_line(error)}"], is_final=False
        )
    else:
        report.last_units()
        report.tell("done")


def as_event(error: EveryscopeError) -> dict[str, Any]:
    """An error of ours as JSON values. What is wrong with the input is final; what a disk or a network says may pass."""
    kind = next(base for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
    given = error.__reduce__()[1] if kind is type(error) else (str(error),)
    return {"kind": kind.__name__, "given": [str(part) for part in given], "is_final": not isinstance(error, StorageError)}


def as_error(event: dict[str, Any]) -> EveryscopeError:
    """The error that `as_event` wrote down."""
    kind = getattr(errors, str(event["kind"]), None)
    if not (isinstance(kind, type) and issubclass(kind, EveryscopeError)):
        kind = EveryscopeError
    return kind(*(str(part) for part in event["given"]))


@contextmanager
def _held(lock: str | None) -> Iterator[bool]:
    """Hold a lock file; False where another process still has it after a while."""
    if lock is None:
        yield True
        return
    path = Path(lock)
    if not path.parent.is_dir():
        raise ConfigError(
            f"{path.parent}: does not exist on {socket.gethostname()}; choose an --out that all hosts of the cluster share"
        )
    with storage_errors(path), path.open("w") as file:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    yield False
                    return
                time.sleep(LOCK_PAUSE)
        yield True


def _leave_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would still hold when the process leaves by itself
        pass
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    main()
