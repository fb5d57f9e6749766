"""Ranks on this host: one process each, watched together, and started again from the last checkpoint when one dies.

An error that a rank reports would come again and ends them all. A rank that just dies, as a machine or an out-of-memory killer
makes it, takes the others with it, for they wait for it; then all restart.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from everyscope.base.errors import EveryscopeError, first_line
from everyscope.base.progress import say
from everyscope.base.signals import EXIT_CODE, termination
from everyscope.train.process_group import LostPeer

MAX_RESTARTS = 3
"""Starts in a row that may end without a step more than before."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Before the first restart, doubled before each further one in a row, and at most [s]."""
POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""After the first rank has failed, the others have so long to say why [s]."""


@dataclass(frozen=True)
class RankInfo:
    """One rank's place on this host."""

    rank: int
    ranks: int
    rendezvous: Path
    """A file that does not exist yet, for `group.file_store`."""


Work = Callable[[Any, RankInfo, Callable[[int], None]], None]
"""What a rank does: (config, seat, progress); progress is called with the steps done in all. A module-level function."""


def launch(
    work: Work,
    config: Any,
    ranks: int,
    progress: Callable[[int], None] = lambda steps: None,
    *,
    max_restarts: int = MAX_RESTARTS,
    first_pause: float = FIRST_PAUSE,
) -> None:
    """Run `work` in `ranks` processes until all have finished; `progress` is called with steps done, each once.

    The cores that torch has here are divided among them. Raises a rank's own error, once; EveryscopeError where ranks keep dying;
    SystemExit, after the ranks have saved what they do, on SIGTERM.
    """
    reports, failures, pause = _RankReports(progress), 0, first_pause
    with termination() as is_asked_to_stop:
        while True:
            before = reports.furthest
            with tempfile.TemporaryDirectory(prefix="everyscope-") as folder:  # for its owner alone
                reason = _attempt(work, config, ranks, Path(folder) / "meeting", reports, is_asked_to_stop)
            if is_asked_to_stop():
                raise SystemExit(EXIT_CODE)
            if reason is None:
                return
            failures, pause = (1, first_pause) if reports.furthest > before else (failures + 1, min(2 * pause, LONGEST_PAUSE))
            if failures > max_restarts:
                raise EveryscopeError(
                    f"{reason}, {failures} times in a row; the same command resumes from the last checkpoint: "
                    "look for what ends it, most likely want of memory"
                )
            say(f"  {reason}; all {ranks} ranks resume from the last checkpoint in {pause:.3g} s")
            _pause(pause, is_asked_to_stop)


def _pause(seconds: float, is_asked_to_stop: Callable[[], bool]) -> None:
    stop = time.monotonic() + seconds
    while (left := stop - time.monotonic()) > 0 and not is_asked_to_stop():
        time.sleep(min(left, POLL_SECONDS))


class _RankReports:
    """What ranks have said, over all starts."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress, self.furthest = progress, 0
        self.error: EveryscopeError | None = None

    def take(self, message: int | EveryscopeError) -> None:
        if isinstance(message, EveryscopeError):
            self.error = message if self.error is None or isinstance(self.error, LostPeer) else self.error
        elif message > self.furthest:
            self._progress(message - self.furthest)
            self.furthest = message


def _attempt(
    work: Work, config: Any, ranks: int, rendezvous: Path, reports: _RankReports, is_asked_to_stop: Callable[[], bool]
) -> str | None:
    """One start of all ranks; None where they finished, else why they did not. Raises the error that a rank reports."""
    context = multiprocessing.get_context("spawn")
    threads, reports.error = max(1, torch.get_num_threads() // ranks), None
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(work, config, RankInfo(rank, ranks, rendezvous), theirs, threads),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _watch(processes, pipes, reports, is_asked_to_stop)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()  # whatever it was doing can be done again from the last checkpoint
            process.join()


def _watch(
    processes: list[BaseProcess], pipes: list[Connection], reports: _RankReports, is_asked_to_stop: Callable[[], bool]
) -> str | None:
    first: BaseProcess | None = None
    is_terminated, deadline = False, float("inf")
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        wait_for_any([*pipes, *(process.sentinel for process in processes if process.is_alive())], POLL_SECONDS)
        _drain(pipes, reports)
        if is_asked_to_stop() and not is_terminated:
            is_terminated = True
            for process in processes:
                process.terminate()
        failed = [process for process in processes if process.exitcode]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        if first is not None and reports.error is not None and not isinstance(reports.error, LostPeer):
            break
    _drain(pipes, reports)
    if first is None and not any(process.exitcode for process in processes):
        return None
    if reports.error is not None and not isinstance(reports.error, LostPeer) and not is_asked_to_stop():
        raise reports.error
    killed = next((process for process in processes if (process.exitcode or 0) < 0), None)
    if killed is not None:
        return f"{killed.name} was killed by signal {-(killed.exitcode or 0)}"
    return f"{(first or processes[0]).name} has left"


def _drain(pipes: list[Connection], reports: _RankReports) -> None:
    """Take all that ranks have said; a pipe whose writer is gone is dropped."""
    for pipe in list(pipes):
        try:
            while pipe.poll():
                reports.take(pipe.recv())
        except (EOFError, OSError):
            pipes.remove(pipe)


def _rank(work: Work, config: Any, rank_info: RankInfo, pipe: Connection, threads: int) -> None:
    """A rank's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; our parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        work(config, rank_info, pipe.send if rank_info.rank == 0 else lambda steps: None)
    except EveryscopeError as error:
        pipe.send(error)
        raise SystemExit(1) from None
    except Exception as error:
        unexpected = EveryscopeError(f"rank {rank_info.rank}: {type(error).__name__}: {first_line(error)}")
        unexpected.add_note(traceback.format_exc())
        pipe.send(unexpected)
        raise SystemExit(1) from None


def _leave_with(sentinel: int) -> None:
    """A rank must not outlive its parent: the next run would find two writers in one folder."""
    wait_for_any([sentinel])
    os._exit(1)
