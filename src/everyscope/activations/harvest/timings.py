"""Where the time of a harvest goes, by the clock on the wall, and how far it is."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PARTS = ("load", "text", "forward", "wait", "commit", "copy", "write", "disk")
"""load: of the model; text: waiting for tokens; forward: the model, and the hooks in it; wait: for the writers;
commit: checksums and writing out, or waiting for the disk, which still has the bucket before. Of several threads, added up, while
the model runs or waits for them: copy, from the device to memory; write, to the places in the shards, with statistics; disk: what
of a commit runs beside the model."""


class Timings:
    """Seconds by part of the work; several threads may add."""

    def __init__(self, tell: Callable[[int], None] = lambda rows: None) -> None:
        """Nothing spent yet. `tell` is called with rows of this process's partition, existing ones included."""
        self.tell = tell
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._lock, self._start = threading.Lock(), time.perf_counter()

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds` as `part` [s]."""
        with self._lock:
            self.seconds[part] += seconds

    def line(self) -> str:
        """The whole time and its parts, for people."""
        share = {part: f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items()}
        total = time.perf_counter() - self._start
        before = ", ".join(share[part] for part in ("load", "text", "forward", "wait", "commit"))
        return f"harvest took {total:.1f} s: {before}; in threads: {share['copy']}, {share['write']}, {share['disk']}"
