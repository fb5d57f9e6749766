"""What one trainer has taken of a site in any order, and what it should ask for next: pure, without threads, clocks or I/O.

The trainer's own account is the truth and the server's a guess: whatever a server sends twice is put away here, and what got lost
on the way is simply not taken, so each chunk is taken exactly once an epoch whatever servers remember.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from everyscope.activations.stream.order import Chunks


@dataclass(frozen=True)
class ChunkRequest:
    """A request for any chunk of a slice."""

    number: int
    """Distinguishes requests; one that is repeated after a lost answer keeps its number."""
    slice: int
    """The slice, and so the server, that is asked."""
    epoch: int
    """The epoch in which the chunk will be used."""


class ChunkTracker:
    """One trainer's account of a site: taken chunks are in the journal, arrived ones wait to be taken."""

    def __init__(self, chunks: Chunks, taken: Sequence[int]) -> None:
        """Continue after the chunks `taken` so far, over all epochs."""
        self._chunks = chunks
        self.num_taken = len(taken)
        self._numbers = 0
        self._open: dict[int, ChunkRequest] = {}
        self._arrived: dict[int, deque[int]] = {}
        self._had: dict[int, Bool[np.ndarray, " chunks"]] = {}
        self._of(self.epoch)[list(taken[self.epoch * chunks.num_chunks :])] = True

    @property
    def epoch(self) -> int:
        """The epoch of the next chunk that is taken."""
        return self.num_taken // self._chunks.num_chunks

    @property
    def num_ahead(self) -> int:
        """Chunks asked for or arrived but not yet taken [chunks]."""
        return len(self._open) + sum(len(queue) for queue in self._arrived.values())

    def next_request(self, is_usable: Sequence[bool]) -> ChunkRequest | None:
        """A request to a usable slice, the one with the fewest open requests, then with the most left; None where there is none.

        The next epoch is asked for as soon as every chunk of this one is asked for, so that no server idles between epochs.
        """
        for epoch in (self.epoch, self.epoch + 1):
            left = self._left(epoch)
            if epoch == self.epoch and not any(left):
                continue  # all of it is under way
            candidates = [index for index, count in enumerate(left) if count > 0 and is_usable[index]]
            if not candidates:
                return None
            open_requests = [sum(request.slice == index for request in self._open.values()) for index in range(len(left))]
            chosen = min(candidates, key=lambda index: (open_requests[index], -left[index], index))
            self._numbers += 1
            request = ChunkRequest(self._numbers, chosen, epoch)
            self._open[request.number] = request
            return request
        return None

    def arrived(self, request: ChunkRequest, chunk: int) -> bool:
        """Note that `chunk` came; False where it was here before or is of another slice, and is put away. The request is over."""
        del self._open[request.number]
        had = self._of(request.epoch)
        if chunk not in self._chunks.slice(request.slice) or had[chunk]:
            return False
        had[chunk] = True
        self._arrived.setdefault(request.epoch, deque()).append(chunk)
        return True

    def gave_up(self, request: ChunkRequest) -> None:
        """The request came to nothing."""
        del self._open[request.number]

    def first(self) -> int | None:
        """The chunk to take next: the first that arrived in this epoch; None where none waits."""
        queue = self._arrived.get(self.epoch)
        return queue[0] if queue else None

    def take(self) -> int:
        """Take it; the caller has it in the journal."""
        epoch = self.epoch
        chunk = self._arrived[epoch].popleft()
        self.num_taken += 1
        if self.epoch > epoch:
            self._had.pop(epoch)
            self._arrived.pop(epoch)
        return chunk

    def seen(self, index: int) -> tuple[int, Bool[np.ndarray, " chunks"]]:
        """What to tell the server of slice `index` in a new lease: the epoch, and which of its chunks are here."""
        chunks = self._chunks.slice(index)
        return self.epoch, self._of(self.epoch)[chunks.start : chunks.stop].copy()

    def any_left(self, request: ChunkRequest, but: Container[tuple[int, int]]) -> int:
        """A chunk that would fulfil the request: the first in the slice that is neither here nor, as (epoch, chunk), in `but`."""
        had = self._of(request.epoch)
        return next(chunk for chunk in self._chunks.slice(request.slice) if not had[chunk] and (request.epoch, chunk) not in but)

    def _left(self, epoch: int) -> list[int]:
        """Chunks of each slice that are neither here nor asked for."""
        had, counts = self._of(epoch), []
        for index in range(self._chunks.num_slices):
            part = self._chunks.slice(index)
            under_way = sum(request.slice == index and request.epoch == epoch for request in self._open.values())
            counts.append(len(part) - int(had[part.start : part.stop].sum()) - under_way)
        return counts

    def _of(self, epoch: int) -> Bool[np.ndarray, " chunks"]:
        if epoch not in self._had:
            self._had[epoch] = np.zeros(self._chunks.num_chunks, bool)
        return self._had[epoch]
