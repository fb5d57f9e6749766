"""Who trains from a server, what each trainer had, and what it will want soon. Pure: time is an argument, nothing is sent."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from everyscope.activations.stream.wire import Refusal

REMEMBERED_ASKS = 64
"""Answers to requests for any chunk that a lease remembers, so that a repeated request gets the same chunk."""
REMEMBERED_LEASES = 1024
"""Replaced leases that are remembered, so that a trainer learns that another one took its name."""


class Refused(Exception):
    """A request that the ring's rules do not allow; `refusal` says to the client what to do."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        """`message` is for people."""
        super().__init__(message)
        self.refusal = refusal


class ChunkKey(NamedTuple):
    """One chunk of one site."""

    site: str
    chunk: int


@dataclass
class Lease:
    """One trainer at one site. In any order `seen` holds what it had; in fixed order `place` is the chunk it will want next."""

    id: str
    trainer: str
    site: str
    slice: range
    is_any: bool
    expires: float
    last_grant: float
    seen: dict[int, Bool[np.ndarray, " slice"]] = field(default_factory=dict)
    answers: OrderedDict[int, int] = field(default_factory=OrderedDict)
    epoch: int = 0
    place: int = 0
    num_waiting: int = 0
    num_pinned: int = 0

    def lacks(self, chunk: int, epoch: int) -> bool:
        """Any order: whether it had not `chunk` in `epoch`."""
        return not self.seen_in(epoch)[chunk - self.slice.start]

    def seen_in(self, epoch: int) -> Bool[np.ndarray, " slice"]:
        """Any order: the chunks it had in `epoch`; an epoch that has ended counts as complete."""
        if epoch < self.epoch:
            return np.ones(len(self.slice), bool)
        if epoch not in self.seen:
            self.seen[epoch] = np.zeros(len(self.slice), bool)
        return self.seen[epoch]

    def mark(self, chunk: int, epoch: int, request: int) -> None:
        """Any order: it was given `chunk` as the answer to request `request`."""
        self.seen_in(epoch)[chunk - self.slice.start] = True
        self.answers[request] = chunk
        if len(self.answers) > REMEMBERED_ASKS:
            self.answers.popitem(last=False)

    def needs(self, chunk: int, window: int) -> bool:
        """Whether it will want `chunk` before it has taken `window` others [chunks]."""
        if self.is_any:
            return self.lacks(chunk, self.epoch)
        return (chunk - self.place) % len(self.slice) < window

    def awaits(self, chunk: int) -> bool:
        """Whether it will want `chunk` before this epoch is over."""
        return self.lacks(chunk, self.epoch) if self.is_any else chunk >= self.place


class Leases:
    """All leases of one server, by id."""

    def __init__(self, lease_seconds: float, slices: dict[str, range]) -> None:
        """`slices` are the chunks of each site that this server holds; a lease ends after `lease_seconds` of silence [s]."""
        self.lease_seconds, self.slices = lease_seconds, slices
        self._live: dict[str, Lease] = {}
        self._replaced: OrderedDict[str, str] = OrderedDict()
        self._with_pins: dict[str, Lease] = {}

    def __len__(self) -> int:
        """Live leases, and ended ones whose last chunks are still on their way."""
        return len(self._live) + sum(lease.id not in self._live for lease in self._with_pins.values())

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    def at(self, site: str) -> list[Lease]:
        """The live leases of one site."""
        return [lease for lease in self._live.values() if lease.site == site]

    def grant(
        self, id: str, trainer: str, site: str, is_any: bool, epoch: int, seen: Bool[np.ndarray, " slice"] | None, now: float
    ) -> tuple[Lease, Lease | None]:
        """A new lease, and the one of the same trainer that it replaces; Refused for a site that is not served."""
        if site not in self.slices:
            raise Refused(Refusal.REQUEST, f"the site {site!r} is not served here; there are {', '.join(self.slices)}")
        before = next((lease for lease in self._live.values() if (lease.trainer, lease.site) == (trainer, site)), None)
        if before is not None:
            self.end(before)
            self._replaced[before.id] = trainer
            if len(self._replaced) > REMEMBERED_LEASES:
                self._replaced.popitem(last=False)
        part = self.slices[site]
        lease = Lease(id, trainer, site, part, is_any, now + self.lease_seconds, now, epoch=epoch, place=part.start)
        if seen is not None:
            lease.seen[epoch] = seen.copy()
        self._live[id] = lease
        return lease, before

    def find(self, id: str, now: float) -> Lease:
        """The live lease of that id, which is renewed by being asked for; Refused where there is none."""
        lease = self._live.get(id)
        if lease is None and id in self._replaced:
            raise Refused(
                Refusal.REPLACED, f"another process trains under the name {self._replaced[id]!r}; give each trainer its own"
            )
        if lease is None:
            raise Refused(Refusal.LEASE, "no such lease here; it has lapsed, or the server has restarted")
        lease.expires = now + self.lease_seconds
        return lease

    def end(self, lease: Lease) -> None:
        """The trainer is gone, or said that it has done."""
        self._live.pop(lease.id, None)

    def expired(self, now: float) -> list[Lease]:
        """Leases that have been silent too long; one that waits for a chunk is not silent."""
        return [lease for lease in self._live.values() if lease.expires <= now and not lease.num_waiting]

    def pin(self, lease: Lease) -> None:
        """A chunk is on its way to the trainer."""
        lease.num_pinned += 1
        self._with_pins[lease.id] = lease

    def unpin(self, lease: Lease) -> None:
        """The chunk was sent, or its call has ended."""
        lease.num_pinned -= 1
        if not lease.num_pinned:
            self._with_pins.pop(lease.id, None)
