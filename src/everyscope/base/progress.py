"""Progress on standard error: a bar with its rate on a terminal, a line now and then in a log file.

Standard output stays free for results, so that `--json` output can be piped.
"""

import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 20.0
"""Seconds between two lines where there is no terminal."""

console = Console(stderr=True, highlight=False)
_quiet = False


def silence_meters() -> None:
    """From here on this process shows no progress: another one shows that of all."""
    global _quiet
    _quiet = True


class Meter:
    """One running count with a known total: `advance` it and the bar, or the log, follows."""

    def __init__(self, title: str, total: float, unit: str, progress: Progress, task: TaskID) -> None:
        """Made by `meter`; `unit` is the plural noun that is counted."""
        self._title, self._total, self._unit = title, total, unit
        self._progress, self._task = progress, task
        self._done, self._counted, self._start = 0.0, 0.0, time.monotonic()
        self._next_line = self._start + LOG_SECONDS

    def advance(self, amount: float = 1, *, is_resumed: bool = False) -> None:
        """Add `amount` to the count; what `is_resumed` was done in an earlier run and stays out of the rate."""
        self._done += amount
        now = time.monotonic()
        if not is_resumed:
            self._counted += amount
        elif not self._counted:  # what was done before is counted first; what others did in between takes no time of ours
            self._start = now
        rate = self._counted / max(now - self._start, 1e-9)
        self._progress.update(self._task, completed=self._done, rate=f"{human_count(rate)} {self._unit}/s")
        if not console.is_terminal and not _quiet and (now >= self._next_line or self._done >= self._total):
            self._next_line = now + LOG_SECONDS
            share = f"{human_count(self._done)}/{human_count(self._total)} {self._unit}"
            left = f", {human_time((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
            print(f"  {self._title}: {share}, {human_count(rate)} {self._unit}/s{left}", file=sys.stderr, flush=True)


@contextmanager
def meter(title: str, total: float, unit: str) -> Iterator[Meter]:
    """A progress bar titled `title` that counts `unit` up to `total` and shows the rate."""
    columns = (
        TextColumn("  [bold]{task.description:<10}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]:<16}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=_quiet or not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, rate="")
        yield Meter(title, total, unit, progress, task)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: escape sequences and other control characters become U+FFFD.

    Titles, names and messages may come out of a file that anybody made.
    """
    return "".join(char if char in "\n\t" or not unicodedata.category(char).startswith("C") else "\ufffd" for char in text)


def say(message: str) -> None:
    """A line for the person who watches, on standard error."""
    console.print(printable(message), soft_wrap=True, markup=False)  # as markup, the brackets of 'everyscope[data]' would vanish


def heading(title: str) -> None:
    """The title of what follows, such as a stage of a run, on standard error."""
    console.print(printable(title), style="bold", markup=False)


def human_time(seconds: float) -> str:
    """As in 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def human_count(count: float) -> str:
    """`count` with a k, M, B or T behind three digits, as in 1.25M."""
    for suffix in ("", "k", "M", "B"):
        if abs(count) < 999.5:  # from there on three digits round to 1e+03
            return f"{count:.3g}{suffix}"
        count /= 1000
    return f"{count:.3g}T"
