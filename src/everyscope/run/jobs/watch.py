"""What becomes of jobs, for people and for programs: a live table on a terminal, lines in a log file, and JSON lines.

Progress that people see goes to standard error; events for programs to standard output, one JSON object a line.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from rich import box
from rich.live import Live
from rich.table import Table

from everyscope.base.files import make_folder, storage_errors
from everyscope.base.progress import LOG_SECONDS, console, human_count, say
from everyscope.run.jobs.child import Event
from everyscope.run.jobs.job import Job
from everyscope.run.jobs.schedule import Watch

MOST_ROWS = 24
"""Jobs shown at once, running ones before waiting ones [rows]."""
LOUD = {"retry", "failed"}
"""Events that are said even where there is no table."""


class Board(AbstractContextManager["Board"]):
    """All jobs of one call: what state each is in, where, and how far."""

    def __init__(self, title: str, jobs: Sequence[Job], unit: str) -> None:
        """`unit` is the plural noun that the jobs' units are counted in."""
        self._title, self._unit = title, unit
        self._state = {job.name: "queued" for job in jobs}
        self._units = {job.name: job.units for job in jobs}
        self._done = dict.fromkeys(self._state, 0)
        self._host: dict[str, str] = {}
        self._attempt: dict[str, int] = {}
        self._text: dict[str, str] = {}
        self._start = self._next_line = time.monotonic()
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Board":
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if console.is_terminal:
            self._live.stop()

    def tell(self, event: Event) -> None:
        """Take an event up."""
        name, what = event["job"], event["event"]
        self._attempt[name] = event.get("attempt", 1)
        if what == "units":
            self._done[name] = event["done"]
        elif what == "says":
            self._text[name] = event["text"].strip()
        else:
            self._state[name] = what
        if what == "started":
            self._host[name] = event["host"]
            self._done[name] = 0
        if what == "done":
            self._done[name] = self._units[name]
        if what in LOUD:
            self._text[name] = event["why"]
            say(f"  {name}: {event['why']}" + (f"; again in {event['seconds']:.0f} s" if what == "retry" else ""))
        if not console.is_terminal:
            self._log(is_last=what == "done" and set(self._state.values()) == {"done"})

    def table(self) -> Table:
        """The jobs, running ones first."""
        table = Table(title=self._summary(), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for heading in ("job", "state", "host", "done", ""):
            table.add_column(heading, no_wrap=True, overflow="ellipsis")
        order = {"started": 0, "retry": 1, "failed": 2, "queued": 3}
        names = sorted(self._state, key=lambda name: order.get(self._state[name], 4))
        for name in names[:MOST_ROWS]:
            again = f" ({self._attempt[name]})" if self._attempt.get(name, 1) > 1 else ""
            done = f"{100 * self._done[name] / self._units[name]:.0f} %" if self._units[name] else ""
            state = "running" if self._state[name] == "started" else self._state[name]
            table.add_row(name, state + again, self._host.get(name, ""), done, self._text.get(name, ""))
        if len(names) > MOST_ROWS:
            table.add_row(f"and {len(names) - MOST_ROWS} more", "", "", "", "")
        return table

    def _summary(self) -> str:
        states = list(self._state.values())
        text = f"{self._title}: {states.count('done')} of {len(states)} jobs done, {states.count('started')} running"
        if total := sum(self._units.values()):
            done = sum(self._done.values())
            seconds = max(time.monotonic() - self._start, 1e-9)
            text += f"; {human_count(done)}/{human_count(total)} {self._unit}, {human_count(done / seconds)}/s"
        return text

    def _log(self, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now >= self._next_line + LOG_SECONDS:
            self._next_line = now
            say(f"  {self._summary()}")


def printed(event: Event) -> None:
    """The event as a line of JSON on standard output."""
    print(json.dumps(event), flush=True)


def written(path: Path) -> Watch:
    """A watch that appends events to a file, one JSON object a line; progress and what jobs say are left out."""
    make_folder(path.parent)

    def write(event: Event) -> None:
        if event["event"] not in ("units", "says"):
            with storage_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    return write


def all_of(watches: Sequence[Callable[[Event], None]]) -> Watch:
    """A watch that tells several."""

    def tell(event: Event) -> None:
        for watch in watches:
            watch(event)

    return tell
