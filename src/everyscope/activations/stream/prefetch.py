"""Chunks of a site by their place in the sequence, some of them ahead of the trainer; one class for each order.

Both give the same chunk for the same place, however often it is asked for: in fixed order since the sequence is a function, in
any order since the journal says what stood there, and asking beyond its end adds to it.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from everyscope.activations.stream.background import in_background
from everyscope.activations.stream.chunk_tracker import ChunkRequest, ChunkTracker
from everyscope.activations.stream.journal import Journal
from everyscope.activations.stream.link import LeaseLost, NotYet, Unreachable
from everyscope.activations.stream.order import Chunks
from everyscope.activations.stream.rows import ChunkRows
from everyscope.activations.stream.servers import FIRST_PAUSE, Pauses
from everyscope.base.errors import StorageError

Certain = Callable[[int], ChunkRows]
"""Gives the rows of a chunk, however long it takes; raises when that is hopeless."""
Any = Callable[[ChunkRequest], tuple[int, ChunkRows]]
"""One try to get any chunk for a request: which, and its rows. Raises Unreachable, NotYet, LeaseLost; EveryscopeErrors are
final."""


class Sequence(Protocol):
    """Chunks by place, counted over all epochs."""

    def chunk(self, place: int) -> ChunkRows:
        """The rows at `place`."""
        ...

    def short_place(self, epoch: int) -> int | None:
        """Where in an epoch the site's last chunk stands; None where it stands behind all that is known."""
        ...

    def keep(self, first: int, last: int) -> None:
        """Of what is held only `first` to `last`, and what was asked for behind them, is needed again soon."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class FixedSequence:
    """The deterministic order."""

    def __init__(self, chunks: Chunks, certain: Certain, ahead: int) -> None:
        """`ahead` chunks are asked for before they are needed [chunks]."""
        self._chunks, self._certain, self._ahead = chunks, certain, ahead
        self._coming: dict[int, Future[ChunkRows]] = {}

    def chunk(self, place: int) -> ChunkRows:
        """The rows at `place`; whatever follows is asked for on the way."""
        for wanted in range(place, place + self._ahead):
            if wanted not in self._coming:
                chunk = self._chunks.at(wanted % self._chunks.num_chunks)
                self._coming[wanted] = in_background(self._certain, chunk)
        try:
            return self._coming[place].result()
        except BaseException:
            self._coming.clear()  # another try is another request
            raise

    def short_place(self, epoch: int) -> int:
        """The same in every epoch."""
        return self._chunks.short_place

    def keep(self, first: int, last: int) -> None:
        """Forget what lies before `first`, or too far behind `last`."""
        self._coming = {p: rows for p, rows in self._coming.items() if first <= p < last + self._ahead}

    def close(self) -> None:
        """Forget all; what is under way ends with its calls."""
        self._coming.clear()


class JournalledSequence:
    """Whatever came first, as the journal has it."""

    def __init__(
        self, chunks: Chunks, journal: Journal, tracker: ChunkTracker, lock: threading.Lock, certain: Certain, any_of: Any,
        ahead: int, deadline: float, seed: int,
    ) -> None:  # fmt: skip
        """`tracker` continues where `journal` ends, under `lock`; silence of all servers for `deadline` is an error [s]."""
        self._chunks, self._journal, self._tracker = chunks, journal, tracker
        self._certain, self._any_of, self._ahead = certain, any_of, ahead
        self._deadline, self._seed = deadline, seed
        self._changed = threading.Condition(lock)
        self._rows: dict[tuple[int, int], ChunkRows] = {}
        self._replayed: dict[int, Future[ChunkRows]] = {}
        self._kept: dict[int, ChunkRows] = {}
        self._not_before = [0.0] * chunks.num_slices
        self._pauses = [Pauses(seed + index) for index in range(chunks.num_slices)]
        self._last_answer = time.monotonic()
        self._trouble: Exception | None = None
        self._fatal: Exception | None = None
        self._is_closed = False
        self._short = {
            place // chunks.num_chunks: place % chunks.num_chunks
            for place, chunk in enumerate(journal.chunks)
            if chunk == chunks.num_chunks - 1
        }

    def chunk(self, place: int) -> ChunkRows:
        """The rows at `place`; the journal grows until it has it."""
        while (end := len(self._journal.chunks)) <= place:
            self._kept[end] = self._next()
        if place in self._kept:
            return self._kept[place]
        for wanted in range(place, min(place + self._ahead, len(self._journal.chunks))):
            if wanted not in self._replayed and wanted not in self._kept:
                self._replayed[wanted] = in_background(self._certain, self._journal.chunks[wanted])
        try:
            return self._replayed[place].result()
        except BaseException:
            self._replayed.clear()
            raise

    def short_place(self, epoch: int) -> int | None:
        """Where the journal has the site's last chunk."""
        return self._short.get(epoch)

    def keep(self, first: int, last: int) -> None:
        """Forget what lies before `first`; the journal can ask for it again."""
        self._kept = {p: rows for p, rows in self._kept.items() if p >= first}
        self._replayed = {p: rows for p, rows in self._replayed.items() if first <= p < last + self._ahead}

    def close(self) -> None:
        """Stop; what is under way ends with its calls."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._journal.close()

    def _next(self) -> ChunkRows:
        """Take the chunk that arrived first, with its record on the disk before it is used."""
        with self._changed:
            self._last_answer = time.monotonic()
            while (chunk := self._tracker.first()) is None:
                if self._fatal is not None:
                    error, self._fatal = self._fatal, None
                    raise error
                if time.monotonic() - self._last_answer > self._deadline:
                    raise StorageError(
                        f"no activation server sent anything for {self._deadline:g} s ({self._trouble}); "
                        "start the servers again, then the same command"
                    )
                self._top_up()
                self._changed.wait(FIRST_PAUSE)
        self._journal.append(chunk)
        with self._changed:
            epoch = self._tracker.epoch
            if chunk == self._chunks.num_chunks - 1:
                self._short[epoch] = self._tracker.num_taken % self._chunks.num_chunks
            assert self._tracker.take() == chunk
            self._top_up()
            return self._rows.pop((epoch, chunk))

    def _top_up(self) -> None:
        """Request chunks up to the limit ahead; the lock is held."""
        while self._tracker.num_ahead < self._ahead and not self._is_closed and self._fatal is None:
            now = time.monotonic()
            request = self._tracker.next_request([now >= time_ for time_ in self._not_before])
            if request is None:
                return
            in_background(self._fulfil, request)

    def _fulfil(self, request: ChunkRequest) -> None:
        """Ask until there is an answer, or reason to ask another server."""
        while not self._is_closed:
            try:
                chunk, rows = self._any_of(request)
            except NotYet:
                self._last_answer = time.monotonic()
            except LeaseLost as error:
                self._trouble = error
                time.sleep(FIRST_PAUSE)  # a server that grants leases and forgets them is not asked without pause
            except Unreachable as error:
                with self._changed:
                    self._trouble = error
                    self._not_before[request.slice] = time.monotonic() + self._pauses[request.slice].next()
                break
            except Exception as error:  # unseen in this thread: the reader that waits for a chunk raises it
                self._fatal = error
                break
            else:
                with self._changed:
                    self._last_answer = time.monotonic()
                    self._pauses[request.slice] = Pauses(self._seed + request.slice)
                    if self._tracker.arrived(request, chunk):
                        self._rows[request.epoch, chunk] = rows
                    self._top_up()
                    self._changed.notify_all()
                return
        with self._changed:
            self._tracker.gave_up(request)
            self._changed.notify_all()
