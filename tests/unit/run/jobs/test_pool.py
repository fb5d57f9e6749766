"""Jobs side by side, and how they end."""

import importlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError, EveryscopeError, MissingExtra
from everyscope.run.jobs.pool import Job, run_jobs

pytestmark = pytest.mark.usefixtures("forked_interpreters")

WORK = """
def write(path, progress):
    path.write_text("done")
    for _ in range(40):
        progress(1)


def fail(error, progress):
    raise error


def die(nothing, progress):
    import os

    os._exit(9)


def train(path, progress):
    # its step never ends
    import os
    import signal
    import time

    signal.signal(signal.SIGTERM, lambda number, frame: path.with_suffix(".asked").write_text(""))
    path.write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def count_threads(path, progress):
    import os

    import torch

    path.write_text(f"{torch.get_num_threads()} {os.environ.get('OPENBLAS_NUM_THREADS')}")
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch):
    """A module that worker processes can import too."""
    (tmp_path / "work_of_the_test.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("work_of_the_test")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_runs(tmp_path: Path, work, workers):
    paths = [tmp_path / str(number) for number in range(5)]
    run_jobs([Job(work.write, path) for path in paths], workers, "jobs", 200, "units")
    assert all(path.read_text() == "done" for path in paths)


def test_threads_follow_from_the_workers_and_not_from_the_jobs_left(tmp_path: Path, work, monkeypatch):
    monkeypatch.setattr("everyscope.run.jobs.pool.os.cpu_count", lambda: 6)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    seen = {}
    for num_jobs in (1, 2, 3):
        paths = [tmp_path / f"{num_jobs}_{number}" for number in range(num_jobs)]
        run_jobs([Job(work.count_threads, path) for path in paths], 2, "jobs", num_jobs, "units")
        seen[num_jobs] = {path.read_text() for path in paths}
    assert seen == {1: {"3 3"}, 2: {"3 3"}, 3: {"3 3"}}
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_a_worker_killed_from_outside_is_one_clear_error(work):
    with pytest.raises(EveryscopeError, match="fewer --workers"):
        run_jobs([Job(work.die, None), Job(work.die, None)], 2, "jobs", 2, "units")


@pytest.mark.parametrize("error", [ConfigError("no such layer"), MissingExtra("datasets", "data", "Reading")])
def test_an_error_comes_home_as_it_was(work, error):
    with pytest.raises(type(error), match=str(error)[:10]):
        run_jobs([Job(work.fail, error), Job(work.fail, error)], 2, "jobs", 2, "units")


def is_alive(pid: int) -> bool:
    """Whether it runs; one that has ended may wait to be reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_second_ctrl_c_ends_workers_in_the_middle_of_a_step(tmp_path: Path, work):
    """Each worker is asked first, and the second time it is not waited for: else this test would never end."""
    paths = [tmp_path / "0.job", tmp_path / "1.job"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        for suffix in (".job", ".asked"):
            while not all(path.with_suffix(suffix).exists() and path.read_text() for path in paths):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    try:
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            run_jobs([Job(work.train, path) for path in paths], 2, "jobs", 2, "units")
    finally:
        presser.join()
        signal.signal(signal.SIGINT, before)
    while any(is_alive(int(path.read_text())) for path in paths):  # killed, and for a moment still on their way out
        time.sleep(0.01)
