"""Independent jobs on this machine: one after another in this process, or side by side in several.

Here jobs go to other processes as pickled functions and configs, for these processes are our own children; what goes to other
hosts does not (job.py).
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import torch

from everyscope.base.allocator import keep_freed_memory
from everyscope.base.errors import EveryscopeError
from everyscope.base.progress import Meter, meter, say, silence_meters
from everyscope.run.jobs.job import Job

POLL_SECONDS = 0.2
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""What numpy's library of products reads when it is loaded."""
REPORTED_UNITS = 16
"""Units a worker counts before it tells its parent, so that telling costs less than the work."""


def run_jobs(jobs: Sequence[Job], workers: int, title: str, total: int, unit: str) -> None:
    """Run all jobs, at most `workers` at a time, under one progress bar of `total` units. The first error ends the rest.

    Each worker process gets an equal share of the cores, by `workers` and not by how many jobs there are: sums depend on the
    number of threads, and a resumed run, with fewer jobs left, must come to the same bits. With one worker everything stays
    in this process.
    """
    if not jobs:
        return
    with meter(title, total, unit) as progress:
        if workers == 1:
            for job in jobs:
                job.run(progress.advance)
        else:
            _run_in_processes(jobs, workers, progress)


def default_workers(num_jobs: int, device: str) -> int:
    """Processes for `num_jobs` jobs: one a core on the CPU, where small products gain little from threads; else one."""
    return max(1, min(num_jobs, os.cpu_count() or 1)) if device == "cpu" else 1


def threads_of(workers: int) -> int:
    """Threads of each of so many jobs side by side; of a single one, all that torch would take [threads]."""
    return torch.get_num_threads() if workers == 1 else max(1, (os.cpu_count() or 1) // workers)


def _run_in_processes(jobs: Sequence[Job], workers: int, progress: Meter) -> None:
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    threads = threads_of(workers)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _Worker.start, (reports, threads))
    try:
        with _blas_threads(threads):
            pending: set[Future[None]] = {pool.submit(_Worker.run, job) for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            while not reports.empty():
                progress.advance(reports.get())
            for future in finished:
                future.result()
    except BrokenProcessPool as error:
        raise EveryscopeError(
            "a worker process was killed from outside, most likely for want of memory; "
            "the same command resumes from its last checkpoint: try it with fewer --workers"
        ) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            say("  stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        _end(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end(pool: ProcessPoolExecutor) -> None:
    """End every worker: one that trains saves a checkpoint after its step and leaves, any other leaves at once.

    A second Ctrl-C does not wait for the step.
    """
    processes = list(pool._processes.values())
    try:
        for process in processes:
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        for process in processes:  # reaping them is the pool's
            wait_for_any([process.sentinel])
        raise


@contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    """Processes that start within this take `count` threads for numpy's products too, which torch's setting does not reach: two
    processes on two cores would each start two, that spin while they wait for one another.
    """
    before = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BLAS_THREADS]
        else:
            os.environ[BLAS_THREADS] = before


class _Worker:
    """What one worker process knows; the class is never instantiated."""

    reports: Any = None

    @classmethod
    def start(cls, reports: Any, threads: int) -> None:
        cls.reports = reports
        silence_meters()
        torch.set_num_threads(threads)
        keep_freed_memory()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; the parent decides
        parent = multiprocessing.parent_process()
        assert parent is not None
        # A worker must not outlive a killed parent: the next run would find two writers in one folder.
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()

    @classmethod
    def run(cls, job: Job) -> None:
        waiting = 0

        def progress(units: int) -> None:
            nonlocal waiting
            waiting += units
            if waiting >= REPORTED_UNITS:
                cls.reports.put(waiting)
                waiting = 0

        try:
            job.run(progress)
        except SystemExit as leaving:  # asked to stop, it has saved its state: the executor would give it the next job
            sys.stderr.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else 1)
        if waiting:
            cls.reports.put(waiting)


def _leave_with(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)
