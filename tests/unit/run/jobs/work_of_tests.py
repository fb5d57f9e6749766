"""Work that tests give to worker processes, which import this module by its name."""

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from everyscope.base.errors import ConfigError, MissingExtra, StorageError
from everyscope.base.schema import Schema


class Task(Schema):
    """What a test's job is to do, and where it leaves it."""

    out: Path
    """The file it writes."""
    what: str = "write"
    """How it goes."""


def plain(task: Task) -> None:
    task.out.write_text(f"{torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {Path.cwd()}")


def counted(task: Task, progress: Callable[[int], None]) -> None:
    """Ten units, kept on disk; what `what` names happens in the middle of the first attempt."""
    done = int(task.out.read_text()) if task.out.exists() else 0
    progress(done)
    for number in range(done, 10):
        if number == 5 and not done:
            mischief(task)
        task.out.write_text(str(number + 1))
        progress(1)


def mischief(task: Task) -> None:
    if task.what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.what == "wrong":
        raise ConfigError("no such layer")
    if task.what == "extra":
        raise MissingExtra("datasets", "data", "Reading")
    if task.what == "disk":
        raise StorageError("the disk was away")
    if task.what == "stray":
        for number in range(3, 64):  # the stream of events is one of these
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(number).st_mode):
                    os.write(number, b"a stray line\n{}\n[1, 2]\n")
    if task.what == "bug":
        print("on its way to a bug", file=sys.stderr)
        raise ZeroDivisionError("division by nothing")


def endless(task: Task) -> None:
    """Until it is asked to stop, which it writes down."""
    task.out.write_text("begun")
    try:
        while True:
            time.sleep(0.01)
    except SystemExit:
        task.out.write_text("in order")
        raise
