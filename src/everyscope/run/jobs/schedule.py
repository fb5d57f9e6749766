"""Jobs on their way through a place that runs them: submitted, watched, tried again after a pause, cancelled together.

What a place is, it says itself; nothing is kept here that is not on disk too, so after a kill one types the same
command again. A job is given up after so many attempts in a row that brought it no further, and then all others are cancelled.
"""

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from everyscope.base.errors import EveryscopeError
from everyscope.run.jobs.child import ENDS, GRACE_SECONDS, Event
from everyscope.run.jobs.job import Job, Resources
from everyscope.run.jobs.worker import as_error

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Before an attempt that follows a lost one; doubled each time [s]."""
POLL_SECONDS = 1.0
CANCEL_SECONDS = 3 * GRACE_SECONDS
"""How long the ends of cancelled jobs are waited for: twice over places kill them before that [s]."""
Watch = Callable[[Event], None]
"""Receives what becomes of jobs: an event with its time, and `job`, the name of one."""


class Executor(ABC):
    """Where attempts run. Of each submitted job it tells events, the last of which is one of ENDS."""

    @abstractmethod
    def side_by_side(self, resources: Resources) -> int:
        """How many such jobs it runs at the same time if it runs nothing else; 0 where it can never run one."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Begin an attempt, or queue it."""

    @abstractmethod
    def cancel(self, name: str) -> None:
        """Ask an attempt to save what it has and to end; does nothing where it has ended."""

    @abstractmethod
    def events(self, seconds: float) -> list[tuple[str, Event]]:
        """Wait so long at most for events, and give all that came: whose, and what [s]."""

    @abstractmethod
    def close(self) -> None:
        """End everything that this place has started."""


@dataclass
class _Attempts:
    """What is known of one job."""

    job: Job
    ready_at: float = 0.0
    count: int = 0
    fruitless: int = 0
    """Attempts in a row that brought it no further."""
    furthest: int = 0
    reached: int = 0
    """Units, of the furthest attempt before this one, and of this one."""
    jitter: random.Random = field(default_factory=random.Random)


class Schedule:
    """One run of several jobs on a place."""

    def __init__(
        self, place: Executor, watch: Watch, tries: int, at_once: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`tries` attempts that bring a job no further are its end; at most `at_once` jobs run side by side (None: as fit)."""
        self._executor, self._watch, self._tries, self._at_once, self._clock = place, watch, tries, at_once, clock
        self._waiting: list[_Attempts] = []
        self._running: dict[str, _Attempts] = {}
        self._pending_events: deque[tuple[str, Event]] = deque()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs to their end, longest first. The first error that is final cancels the rest and is raised.

        Whatever else ends this, as Ctrl-C or SIGTERM, cancels all of them too, and waits until they have saved what they have.
        """
        assert len({job.name for job in jobs}) == len(jobs), "jobs that run together have names of their own"
        ordered = sorted(jobs, key=lambda job: (not job.is_service, -job.cost))
        self._waiting = [_Attempts(job, jitter=random.Random(job.name)) for job in ordered]
        for job in ordered:
            self._tell(job.name, "queued", units=job.units)
        try:
            while any(not attempts.job.is_service for attempts in (*self._waiting, *self._running.values())):
                self._submit()
                self._pending_events.extend(self._executor.events(self._pause()))
                while self._pending_events:  # one by one: an error in the middle must not swallow the ends behind it
                    name, event = self._pending_events.popleft()
                    if name in self._running:
                        self._take(self._running[name], event)
        finally:  # services, where all went well
            self._cancel()

    def _submit(self) -> None:
        now = self._clock()
        for attempts in [attempts for attempts in self._waiting if attempts.ready_at <= now]:
            at_work = sum(not running.job.is_service for running in self._running.values())
            if self._at_once is not None and at_work >= self._at_once and not attempts.job.is_service:
                continue
            self._waiting.remove(attempts)
            attempts.count, attempts.reached = attempts.count + 1, 0
            self._running[attempts.job.name] = attempts
            self._executor.submit(attempts.job)

    def _pause(self) -> float:
        """How long nothing needs to be done but listen [s]."""
        soonest = min((attempts.ready_at for attempts in self._waiting), default=self._clock() + POLL_SECONDS)
        return min(max(soonest - self._clock(), 0.0), POLL_SECONDS) or POLL_SECONDS

    def _take(self, attempts: _Attempts, event: Event) -> None:
        name, what = attempts.job.name, event["event"]
        if what == "units":
            attempts.reached = int(event["done"])
        if what not in ENDS or what == "done":
            self._tell(name, what, **{key: value for key, value in event.items() if key != "event"}, attempt=attempts.count)
        if what in ENDS:
            del self._running[name]
        if what == "failed" and event["is_final"]:
            self._tell(name, "failed", why=" ".join(event["given"]), attempt=attempts.count)
            raise as_error(event)
        if what in ENDS and (what != "done" or attempts.job.is_service):
            self._try_again(attempts, event)

    def _try_again(self, attempts: _Attempts, event: Event) -> None:
        """Let a job that ended before its time wait for its next attempt. EveryscopeError where it had enough of them."""
        why, name = _words(event), attempts.job.name
        is_further = attempts.reached > attempts.furthest
        attempts.furthest = max(attempts.furthest, attempts.reached)
        if is_further:
            attempts.fruitless = 0
        elif not event.get("is_blameless", False):
            attempts.fruitless += 1
        if attempts.fruitless >= self._tries:
            self._tell(name, "failed", why=why, attempt=attempts.count)
            if event["event"] == "failed":
                raise as_error(event)
            raise EveryscopeError(
                f"{name}: {why}; {attempts.fruitless} attempts in a row made no progress. What is done is kept: fix the cause, "
                "or lower what the job needs, and run the same command to resume"
            )
        doubled = FIRST_PAUSE * 2.0 ** max(attempts.fruitless - 1, 0)
        pause = min(doubled, LONGEST_PAUSE) * (1 + attempts.jitter.random()) / 2
        attempts.ready_at = self._clock() + pause
        self._waiting.append(attempts)
        self._tell(name, "retry", why=why, attempt=attempts.count, seconds=round(pause, 3))

    def _cancel(self) -> None:
        for name in self._running:
            self._executor.cancel(name)
        end = self._clock() + CANCEL_SECONDS
        while self._running and self._clock() < end:
            while self._pending_events:
                name, event = self._pending_events.popleft()
                if name in self._running and event["event"] in ENDS:
                    del self._running[name]
                    self._tell(name, "cancelled")
            if self._running:
                self._pending_events.extend(self._executor.events(POLL_SECONDS))

    def _tell(self, name: str, event: str, **details: Any) -> None:
        self._watch({"time": round(time.time(), 3), "event": event, "job": name} | details)


def _words(event: Event) -> str:
    """Why an attempt ended, for people."""
    words = {"busy": "an earlier attempt still holds its lock", "stopped": "its host asked it to stop", "done": "it ended"}
    return words.get(event["event"]) or event.get("why") or " ".join(event.get("given", []))
