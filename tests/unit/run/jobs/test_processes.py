"""Jobs in processes of their own on this host: how they end, what they see, and that none is left behind."""

import fcntl
import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError, EveryscopeError, MissingExtra, StorageError
from everyscope.run.jobs import worker
from everyscope.run.jobs.job import Job, Resources, spec_of
from everyscope.run.jobs.processes import Processes
from everyscope.run.jobs.runner import remove_unheld
from everyscope.run.jobs.schedule import Schedule

pytestmark = pytest.mark.usefixtures("forked_interpreters")


@pytest.fixture
def work(monkeypatch):
    """The module with the work, where worker processes find it too."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    return importlib.import_module("work_of_tests")


def run(tmp_path: Path, jobs: list[Job], cpus: int = 2, devices: list[str] | None = None, tries: int = 2) -> list[dict]:
    told: list[dict] = []
    place = Processes(cpus, devices or [], tmp_path)
    try:
        Schedule(place, told.append, tries).run(jobs)
    finally:
        place.close()
    return told


def test_a_killed_job_goes_on_and_an_error_of_the_disk_is_tried_again(tmp_path, work):
    ways = ("write", "killed", "disk")
    jobs = [Job(work.counted, work.Task(out=tmp_path / what, what=what), what, units=10) for what in ways]
    told = run(tmp_path, jobs)
    assert [(tmp_path / what).read_text() for what in ways] == ["10"] * 3
    whys = {event["job"]: event["why"] for event in told if event["event"] == "retry"}
    assert whys == {"killed": "its process was killed by SIGKILL", "disk": "the disk was away"}
    assert [event["done"] for event in told if event["event"] == "units"][-1] == 10


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("wrong", ConfigError, "no such layer"),
        ("extra", MissingExtra, "pip install"),
        ("bug", EveryscopeError, "ZeroDivision"),
        ("disk", StorageError, "away"),
    ],
)
def test_an_error_comes_home_as_it_was(tmp_path, work, what, error, words):
    job = Job(work.counted, work.Task(out=tmp_path / "out", what=what), "job")
    told = io.StringIO()
    worker.run(spec_of(job, None), worker.Report(told))
    end = json.loads(told.getvalue().splitlines()[-1])
    caught = worker.as_error(end)
    assert type(caught) is error
    assert words in str(caught)
    assert end["is_final"] == (what in ("wrong", "extra"))


def test_jobs_see_their_devices_threads_and_folder(tmp_path, work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wants = [(2, 0.5), (1, 2.0), (1, 0.0)]
    jobs = [
        Job(work.plain, work.Task(out=Path(str(number))), str(number), Resources(cpus=cpus, gpus=gpus))
        for number, (cpus, gpus) in enumerate(wants)
    ]
    run(tmp_path, jobs, cpus=8, devices=["3", "5"])
    for number, (cpus, gpus) in enumerate(wants):
        threads, devices, folder = (tmp_path / str(number)).read_text().split(" ", 2)
        assert (int(threads), Path(folder)) == (cpus, tmp_path)
        assert sorted(devices.split(",") if devices else []) in ([], ["3"], ["5"], ["3", "5"])
        assert len([name for name in devices.split(",") if name]) == (0 if not gpus else max(1, int(gpus)))


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        (Resources(cpus=3), 2),
        (Resources(cpus=9), 0),
        (Resources(gpus=0.3), 6),
        (Resources(gpus=1 / 3), 6),
        (Resources(gpus=1.0), 2),
        (Resources(gpus=2.0), 1),
        (Resources(gpus=3.0), 0),
        (Resources(cpus=4, gpus=0.1), 2),
    ],
)
def test_how_many_fit_beside_one_another(resources, count):
    assert Processes(8, ["0", "1"], None).side_by_side(resources) == count


def test_stopped_from_outside_a_job_leaves_in_order(tmp_path, work):
    place = Processes(1, [], tmp_path)
    place.submit(Job(work.endless, work.Task(out=tmp_path / "out"), "job"))
    while not (tmp_path / "out").exists():
        place.events(0.01)
    place.cancel("job")
    ends = []
    while not ends:
        ends = [event["event"] for _, event in place.events(0.1) if event["event"] == "stopped"]
    assert (tmp_path / "out").read_text() == "in order"


def test_a_job_does_not_outlive_whoever_started_it(tmp_path, work):
    spec = spec_of(Job(work.endless, work.Task(out=tmp_path / "out"), "job"), tmp_path)
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdin is not None
    assert starter.stdout is not None
    starter.stdin.write(spec.model_dump_json() + "\n")
    starter.stdin.flush()
    pid = int(starter.stdout.readline())
    while not (tmp_path / "out").exists():
        time.sleep(0.01)
    starter.kill()
    starter.communicate()
    while is_alive(pid):
        time.sleep(0.01)
    assert (tmp_path / "out").read_text() == "begun"  # it left at once, without a word


STARTER = """
import sys, time
from everyscope.run.jobs.child import Child
from everyscope.run.jobs.job import Spec

tell = lambda event: event["event"] == "started" and print(event["pid"], flush=True)
child = Child(Spec.model_validate_json(sys.stdin.readline()), tell)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_attempts_never_work_at_the_same_time(tmp_path, work, monkeypatch):
    monkeypatch.setattr("everyscope.run.jobs.worker.LOCK_SECONDS", 0.0)
    spec = spec_of(Job(work.plain, work.Task(out=tmp_path / "out"), "job"), tmp_path)
    for is_held, end in ((True, "busy"), (False, "done")):
        told = io.StringIO()
        with Path(spec.lock or "").open("w") as lock:
            if is_held:
                fcntl.flock(lock, fcntl.LOCK_EX)
            worker.run(spec, worker.Report(told))
        assert json.loads(told.getvalue().splitlines()[-1])["event"] == end
        assert (tmp_path / "out").exists() != is_held


def test_a_host_without_the_runs_folder_says_so(tmp_path, work):
    spec = spec_of(Job(work.plain, work.Task(out=tmp_path / "out"), "job"), tmp_path / "elsewhere")
    told = io.StringIO()
    worker.run(spec, worker.Report(told))
    assert "all hosts of the cluster share" in told.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.0.1"},
        {"work": "os:system"},
        {"work": "everyscope.nothing:run"},
        {"work": "everyscope"},
        {"work": "work_of_tests:Task.model_validate"},
        {"kind": "pathlib:Path"},
        {"config": {"out": "x", "command": "y"}},
    ],
)
def test_a_spec_that_is_not_of_ours_is_refused(tmp_path, work, change):
    spec = spec_of(Job(work.plain, work.Task(out=tmp_path / "out"), "job"), tmp_path).model_copy(update=change)
    told = io.StringIO()
    worker.run(spec, worker.Report(told))
    end = json.loads(told.getvalue().splitlines()[-1])
    assert (end["event"], end["kind"], end["is_final"]) == ("failed", "ConfigError", True)
    assert not (tmp_path / "out").exists()


def test_work_that_has_no_name_of_its_own_is_refused(work, tmp_path):
    with pytest.raises(ConfigError, match="at the top of a module"):
        spec_of(Job(lambda task: None, work.Task(out=tmp_path), "job"), None)


def test_lines_that_are_no_events_are_heard_and_hang_nothing(tmp_path, work):
    """A library, or the interpreter as it dies, may write to the stream that events go by."""
    told = run(tmp_path, [Job(work.counted, work.Task(out=tmp_path / "out", what="stray"), "stray", units=10)])
    assert (tmp_path / "out").read_text() == "10"
    said = [event["text"] for event in told if event["event"] == "says"]
    assert {"a stray line", "{}", "[1, 2]"} <= set(said)


def test_a_lock_that_somebody_holds_is_not_taken_away(tmp_path):
    held, left = tmp_path / "held.lock", tmp_path / "left.lock"
    left.touch()
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for lock in (held, left, tmp_path / "gone.lock"):
            remove_unheld(lock)
        assert held.exists()
        assert not left.exists()
    remove_unheld(held)
    assert not held.exists()
