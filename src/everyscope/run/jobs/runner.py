"""One interface for jobs, wherever they run: in this process, in several on this host, or on the hosts of a Ray cluster.

runner.run(jobs, "training groups", "steps")       all of them, to their end; the first final error ends the rest
runner.side_by_side(resources)           among how many of such jobs work is worth dividing
"""

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from everyscope.base.errors import ConfigError
from everyscope.base.files import make_folder
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job, Resources
from everyscope.run.jobs.pool import run_jobs
from everyscope.run.jobs.processes import VISIBLE, Processes
from everyscope.run.jobs.ray_executor import RayExecutor
from everyscope.run.jobs.schedule import Executor, Schedule, Watch
from everyscope.run.jobs.watch import Board, all_of, written

EVENTS_FILE = "events.jsonl"


class Runner(ABC):
    """Where jobs run."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], title: str, unit: str = "units", workers: int | None = None) -> None:
        """Run all jobs, at most `workers` side by side (None: as many as there is room for). Raises the first final error."""

    @abstractmethod
    def side_by_side(self, resources: Resources) -> int:
        """How many such jobs run at the same time; 1 where dividing work gains nothing. ConfigError where none ever can."""


class LocalRunner(Runner):
    """This process, or a pool of them that share this host's cores."""

    def run(self, jobs: Sequence[Job], title: str, unit: str = "units", workers: int | None = None) -> None:
        """One after another here, unless `workers` allows more. Jobs without units show their own progress."""
        total = sum(job.units for job in jobs)
        if total:
            run_jobs(jobs, workers or 1, title, total, unit)
            return
        for job in jobs:
            job.run(lambda units: None)

    def side_by_side(self, resources: Resources) -> int:
        """1: a job of the language model takes the whole host."""
        return 1


class ExecutorRunner(Runner):
    """Jobs in processes of their own at some place, tried again when they are lost."""

    def __init__(self, place: Executor, tries: int, folder: Path | None, watches: Sequence[Watch] = ()) -> None:
        """`folder` gets events.jsonl; `watches` receive every event too."""
        self._executor, self._tries = place, tries
        self._watches = [*watches, *([written(folder / EVENTS_FILE)] if folder else [])]

    def run(self, jobs: Sequence[Job], title: str, unit: str = "units", workers: int | None = None) -> None:
        """All at once, as far as there is room, longest first."""
        if not jobs:
            return
        for job in jobs:
            self.side_by_side(job.resources)
        with Board(title, jobs, unit) as board:
            Schedule(self._executor, all_of([board.tell, *self._watches]), self._tries, workers).run(jobs)

    def side_by_side(self, resources: Resources) -> int:
        """As the place says; ConfigError where it is 0."""
        count = self._executor.side_by_side(resources)
        if not count:
            needs = f"{resources.cpus} cores, {resources.gpus:g} GPUs and {resources.memory_bytes} bytes"
            raise ConfigError(
                f"no host of the cluster has the {needs} that a job needs; add such a host, "
                "or lower --job-cpus, or what the job holds in memory"
            )
        return count


@contextmanager
def opened_runner(config: EngineConfig, folder: Path, watches: Sequence[Watch] = ()) -> Iterator[Runner]:
    """The runner that a config names; `folder`, below the run's own, keeps locks and events of jobs that leave this process.

    ConfigError and MissingExtra where Ray is not fit to be used, EveryscopeError where its cluster does not answer.
    """
    devices = visible_devices()
    cpus = os.cpu_count() or 1
    if config.engine == "local" and len(devices) < 2:
        yield LocalRunner()
        return
    place = Processes(cpus, devices, folder) if config.engine == "local" else RayExecutor(config, cpus, len(devices), folder)
    try:
        make_folder(folder)
        yield ExecutorRunner(place, config.tries, folder, watches)
    finally:
        place.close()
        for lock in folder.glob("*.lock"):
            remove_unheld(lock)


def remove_unheld(lock: Path) -> None:
    """Delete a lock that nobody holds. That of a host which is only slow stays, or a second attempt would write beside it."""
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        pass


def visible_devices() -> list[str]:
    """This host's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
