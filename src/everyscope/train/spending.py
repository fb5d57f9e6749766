"""Where the time of a training goes, by the host's clock, and how many rows it takes in a second.

The host does not wait for a GPU at every step, but it never runs more than a few steps ahead, so that over many steps each part
has its share: what a GPU computes shows as `steps`, rows that come too slowly as `rows`, on a GPU as on a CPU.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
PARTS = ("rows", "steps", "saving")
"""rows: waiting for the next batch, which a thread reads meanwhile; steps: computing; saving: checkpoints, logs, progress."""


class Spending:
    """Seconds by part, and rows."""

    def __init__(self) -> None:
        """Nothing spent yet."""
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.num_rows = 0

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time until each arrives counted as rows."""
        iterator = iter(items)
        while True:
            with self.on("rows"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def as_json(self) -> dict[str, Any]:
        """Rows, seconds, rows per second and the parts' shares."""
        total = sum(self.seconds.values())
        return {
            "rows": self.num_rows,
            "seconds": round(total, 3),
            "rows_per_second": round(self.num_rows / total, 1) if total else 0.0,
            "shares": {part: round(seconds / total, 4) if total else 0.0 for part, seconds in self.seconds.items()},
        }


def together(spent: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What several training groups spent, as `as_json` gives it: seconds and rows added up."""
    whole = Spending()
    for one in spent:
        whole.num_rows += one["rows"]
        for part, share in one["shares"].items():
            whole.seconds[part] += share * one["seconds"]
    return whole.as_json()
