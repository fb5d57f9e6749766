"""Jobs on their way: each ends once, tries follow one another as they should, and the end of one is the end of all."""

import random
from collections import deque
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError, EveryscopeError, StorageError
from everyscope.run.jobs.job import Job, Resources
from everyscope.run.jobs.schedule import FIRST_PAUSE, LONGEST_PAUSE, Executor, Schedule

LOST = {"event": "lost", "why": "its process was killed by SIGKILL"}
DONE = {"event": "done"}


def final(message: str) -> dict:
    return {"event": "failed", "kind": "ConfigError", "given": [message], "is_final": True}


def units(done: int) -> dict:
    return {"event": "units", "done": done}


class Stage(Executor):
    """A place where each attempt goes as it is written, on a clock that only waiting moves."""

    def __init__(self, scripts: dict[str, list[list[dict]]], slots: int = 10**6) -> None:
        self.scripts = {name: deque(attempts) for name, attempts in scripts.items()}
        self.slots, self.now = slots, 0.0
        self.running: dict[str, deque[dict]] = {}
        self.begun: list[tuple[float, str]] = []
        self.told: list[dict] = []
        self.most = 0
        self.random = random.Random(0)

    def side_by_side(self, resources: Resources) -> int:
        return self.slots // resources.cpus

    def submit(self, job: Job) -> None:
        assert job.name not in self.running, "two attempts of one job"
        self.running[job.name] = deque(self.scripts[job.name].popleft())
        self.begun.append((self.now, job.name))
        self.most = max(self.most, len(self.running))

    def cancel(self, name: str) -> None:
        self.running[name] = deque([{"event": "stopped"}])

    def events(self, seconds: float) -> list[tuple[str, dict]]:
        ready = [name for name, script in self.running.items() if script]
        if not ready:
            self.now += seconds
            return []
        name = self.random.choice(ready)
        event = self.running[name].popleft()
        if event["event"] not in ("units", "says", "started"):
            del self.running[name]
        return [(name, event)]

    def close(self) -> None:
        assert not self.running


def run(stage: Stage, tries: int = 3, at_once: int | None = None, **costs: float) -> list[dict]:
    told: list[dict] = []
    jobs = [Job(run, Path(name), name, cost=costs.get(name, 0.0), is_service=name == "service") for name in stage.scripts]
    try:
        Schedule(stage, told.append, tries, at_once, clock=lambda: stage.now).run(jobs)
    finally:
        stage.told = told
        assert not stage.running, "something was left running"
    return told


def of(told: list[dict], name: str) -> list[str]:
    return [event["event"] for event in told if event["job"] == name]


@pytest.mark.parametrize("seed", range(20))
def test_every_job_is_done_once_however_attempts_end(seed):
    chance = random.Random(seed)
    ends = [LOST, {"event": "busy"}, {"event": "stopped"}]
    scripts = {
        str(job): [*([chance.choice(ends)] for _ in range(chance.randrange(4))), [units(1), DONE]]
        for job in range(chance.randrange(1, 12))
    }
    attempts = {name: len(script) for name, script in scripts.items()}
    at_once = chance.choice([None, 1, 3])
    stage = Stage(scripts)
    told = run(stage, tries=4, at_once=at_once)
    for name, count in attempts.items():
        assert of(told, name) == ["queued", *["retry"] * (count - 1), "units", "done"]
    assert at_once is None or stage.most <= at_once


def test_pauses_double_up_to_the_longest_and_never_reach_back():
    stage = Stage({"a": [[LOST]] * 9 + [[DONE]]})
    pauses = [event["seconds"] for event in run(stage, tries=10) if event["event"] == "retry"]
    for number, pause in enumerate(pauses):
        whole = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)
        assert whole / 2 <= pause <= whole
    begun = [when for when, _ in stage.begun]
    assert all(later - earlier >= pause - 1e-3 for earlier, later, pause in zip(begun, begun[1:], pauses, strict=False))


def test_attempts_that_bring_a_job_further_are_not_held_against_it():
    steps = [[units(number), LOST] for number in range(1, 30)]
    assert of(run(Stage({"a": [*steps, [DONE]]}), tries=2), "a").count("retry") == 29


def test_the_loss_of_the_place_itself_is_not_held_against_jobs():
    away = LOST | {"is_blameless": True}
    assert of(run(Stage({"a": [[away]] * 9 + [[DONE]]}), tries=1), "a")[-1] == "done"


def test_a_job_that_never_gets_further_ends_the_run_and_the_others():
    stage = Stage({"a": [[units(5), LOST]] * 9, "b": [[]]})
    with pytest.raises(EveryscopeError, match=r"a: its process was killed by SIGKILL; 2 attempts in a row"):
        run(stage, tries=2)
    assert len([name for _, name in stage.begun if name == "a"]) == 3  # the first went from 0 to 5, the others no further
    assert of(stage.told, "b") == ["queued", "cancelled"]


@pytest.mark.parametrize(("kind", "error"), [("ConfigError", ConfigError), ("StorageError", StorageError)])
def test_the_error_that_ends_a_run_is_the_jobs_own(kind, error):
    failed = {"event": "failed", "kind": kind, "given": ["no such layer"], "is_final": kind == "ConfigError"}
    with pytest.raises(error, match="no such layer"):
        run(Stage({"a": [[failed]] * 3, "b": [[]]}), tries=3)


def test_a_final_error_is_not_tried_again():
    stage = Stage({"a": [[final("wrong")], [DONE]], "b": [[]]})
    with pytest.raises(ConfigError, match="wrong"):
        run(stage)
    assert [name for _, name in stage.begun].count("a") == 1


def test_whatever_ends_the_run_stops_all_that_is_under_way():
    class Interrupted(Stage):
        def events(self, seconds):
            if len(self.begun) == 2 and not self.is_over:
                self.is_over = True
                raise KeyboardInterrupt
            return super().events(seconds)

        is_over = False

    stage = Interrupted({"a": [[]], "b": [[]]})
    with pytest.raises(KeyboardInterrupt):
        run(stage)
    assert of(stage.told, "a") == of(stage.told, "b") == ["queued", "cancelled"]


def test_ends_that_come_with_a_final_error_are_not_waited_for():
    class Together(Stage):
        def events(self, seconds):
            found = []
            while any(self.running.values()):
                found += super().events(seconds)
            return found

    stage = Together({"a": [[final("wrong")]], "b": [[LOST]], "c": [[DONE]]})
    with pytest.raises(ConfigError, match="wrong"):
        run(stage)
    assert {of(stage.told, name)[-1] for name in "bc"} <= {"cancelled", "retry", "done"}


def test_longest_jobs_begin_first():
    stage = Stage({"short": [[DONE]], "long": [[DONE]], "middle": [[DONE]]})
    run(stage, at_once=1, short=1, long=3, middle=2)
    assert [name for _, name in stage.begun] == ["long", "middle", "short"]


def test_a_service_begins_first_is_started_again_when_lost_and_ends_with_the_others():
    stage = Stage({"a": [[units(1)] * 40 + [DONE]], "service": [[LOST], [DONE], []]})
    told = run(stage, at_once=1, a=9)
    assert stage.begun[0] == (0.0, "service")
    assert of(told, "a")[-1] == "done"
    assert of(told, "service")[0] == "queued"
