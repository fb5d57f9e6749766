"""The buffer's rules: which chunk is read, sent, kept and replaced. A state machine without threads, clocks or I/O.

Slots, a fixed number, hold chunks of all sites. A chunk is read only when a trainer waits for it: trainers ask some chunks ahead,
and so the buffer fills ahead of the fastest of them, while nothing is read on speculation. It is *pinned* while it is on its way
to a trainer. What is replaced is the oldest chunk that is not pinned, those first that no trainer will want soon.

Why nobody starves: there are fewer leases than slots, and no lease pins more than its share of all slots but one. So a slot can
always be freed, and requests are served in the order in which they came. (A share shrinks when others come; what a stalled
trainer has pinned beyond it ends with the deadlines of its calls.)

`hold_seconds` lets laggards hold the others back: a chunk that a lease will want soon is not replaced until that lease has been
granted nothing for so long. A lease that waits holds nothing, so two leases never hold up each other. 0 is the paper's way: the
fastest sets the pace, and laggards get what they missed when it is read again. An origin whose chunks are dear, such as a
language model, wants more. It may also give several chunks at once (`group`): those that a live lease may want are kept.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from everyscope.activations.serve.counters import ServerCounters
from everyscope.activations.serve.leases import ChunkKey, Lease, Leases, Refused
from everyscope.activations.stream.wire import Refusal


@dataclass
class _Entry:
    """A chunk in the buffer."""

    loaded_at: float
    pins: int = 0
    served: int = 0


@dataclass
class _Wait:
    """A request that has no chunk yet."""

    lease: Lease
    chunk: int | None
    epoch: int
    request: int
    since: float
    is_hit: bool = True


@dataclass(frozen=True)
class Grant:
    """A chunk for a request; it stays pinned until `Ring.sent` is called with it."""

    wait: int
    key: ChunkKey


@dataclass
class Decision:
    """What the ring's driver must do now."""

    grants: list[Grant] = field(default_factory=list)
    """Hand these over."""
    loads: list[ChunkKey] = field(default_factory=list)
    """Get these from the origin, in this order, each with its group."""
    drops: list[ChunkKey] = field(default_factory=list)
    """Forget the rows of these."""
    lapsed: list[Lease] = field(default_factory=list)
    """Leases that have ended by silence, for the log."""


class Ring:
    """The state of one server's buffer."""

    def __init__(
        self,
        slots: int,
        leases: Leases,
        counters: ServerCounters,
        num_bytes: Callable[[ChunkKey], int],
        group: Callable[[ChunkKey], tuple[ChunkKey, ...]] = lambda key: (key,),
        in_flight: int = 4,
        hold_seconds: float = 0.0,
    ) -> None:
        """`num_bytes` is a chunk's size, `group` what the origin gives together with it."""
        assert slots >= 2, f"slots={slots}"
        self.slots, self.leases, self.counters = slots, leases, counters
        self._num_bytes, self._group = num_bytes, group
        self._in_flight, self._hold_seconds = in_flight, hold_seconds
        self._entries: OrderedDict[ChunkKey, _Entry] = OrderedDict()
        self._loading: dict[ChunkKey, tuple[ChunkKey, ...]] = {}
        self._waits: dict[int, _Wait] = {}
        self._sending: dict[int, tuple[ChunkKey, Lease]] = {}
        self._numbers = 0
        self._cursors = {site: part.start for site, part in leases.slices.items()}

    def lease(
        self,
        id: str,
        trainer: str,
        site: str,
        is_any: bool,
        epoch: int = 0,
        seen: Bool[np.ndarray, " slice"] | None = None,
        *,
        now: float,
    ) -> tuple[Lease, Lease | None]:
        """Let a trainer in, and say which lease of its own that replaces; Refused where there is no room for one more."""
        for silent in self.leases.expired(now):
            self.leases.end(silent)
        own = [lease for lease in self.leases if (lease.trainer, lease.site) == (trainer, site)]
        if len(self.leases) - len(own) >= self.slots - 1:
            message = f"{len(self.leases)} trainers are all that {self.slots} slots can serve; give the server a larger buffer"
            raise Refused(Refusal.BUSY, message)
        lease, before = self.leases.grant(id, trainer, site, is_any, epoch, seen, now)
        if before is not None:
            self._waits = {number: wait for number, wait in self._waits.items() if wait.lease is not before}
        return lease, before

    def request(self, lease_id: str, chunk: int | None, epoch: int = 0, request: int = 0, *, now: float) -> int:
        """A request for a certain chunk, or (None) for any that the trainer lacks in `epoch`; the number of the wait.

        Refused for an unknown lease, a chunk of another server, more requests than a lease may have, or an epoch had in full.
        """
        lease = self.leases.find(lease_id, now)
        if lease.num_waiting + lease.num_pinned >= 4 * self._in_flight:
            raise Refused(Refusal.BUSY, f"a lease has at most {4 * self._in_flight} requests open; wait for some of them")
        if chunk is not None and chunk not in lease.slice:
            held = f"{lease.slice.start} to {lease.slice.stop - 1}" if lease.slice else "none"
            raise Refused(Refusal.REQUEST, f"chunk {chunk} of {lease.site} is not in this server's slice, which has {held}")
        if chunk is None:
            chunk = self._repeated(lease, epoch, request)
        self._numbers += 1
        self._waits[self._numbers] = _Wait(lease, chunk, epoch, request, now)
        lease.num_waiting += 1
        return self._numbers

    def _repeated(self, lease: Lease, epoch: int, request: int) -> int | None:
        """The chunk that request `request` was answered with before, or None for a request that is new."""
        if not lease.is_any:
            raise Refused(Refusal.REQUEST, "a lease in fixed order asks for certain chunks")
        if request in lease.answers:
            return lease.answers[request]
        while lease.slice and lease.epoch < epoch and lease.seen_in(lease.epoch).all():
            lease.seen.pop(lease.epoch)
            lease.epoch += 1
        if not lease.epoch <= epoch <= lease.epoch + 1:
            raise Refused(Refusal.LEASE, f"epoch {epoch} is not that of the lease, {lease.epoch}, or the next; take a new lease")
        open_requests = sum(w.lease is lease and w.chunk is None and w.epoch == epoch for w in self._waits.values())
        if int((~lease.seen_in(epoch)).sum()) <= open_requests:
            raise Refused(Refusal.EXHAUSTED, f"every chunk of epoch {epoch} was given to this lease")
        return None

    def withdraw(self, wait: int) -> None:
        """The request is given up; nothing happens where it was granted or ended already."""
        gone = self._waits.pop(wait, None)
        if gone is not None:
            gone.lease.num_waiting -= 1

    def release(self, lease_id: str, now: float) -> Lease:
        """The trainer needs no more."""
        lease = self.leases.find(lease_id, now)
        self._waits = {number: wait for number, wait in self._waits.items() if wait.lease is not lease}
        self.leases.end(lease)
        return lease

    def is_waiting(self, wait: int) -> bool:
        """Whether the request is neither granted nor gone."""
        return wait in self._waits

    def loaded(self, key: ChunkKey, now: float) -> list[ChunkKey]:
        """The load that began with `key` is done; which of its group's chunks are to be kept."""
        kept = self._loading.pop(key)
        for member in kept:
            self._entries[member] = _Entry(now)
            self.counters.read(member.site, self._num_bytes(member))
        return list(kept)

    def failed(self, key: ChunkKey) -> list[int]:
        """The load that began with `key` failed: the waits that it leaves without hope, which are withdrawn."""
        self._loading.pop(key)
        hopeless = [n for n, w in self._waits.items() if w.lease.site == key.site and w.chunk in (None, key.chunk)]
        for number in hopeless:
            self.withdraw(number)
        return hopeless

    def sent(self, wait: int) -> None:
        """The grant's chunk has been sent, or its call has ended."""
        key, lease = self._sending.pop(wait)
        self.leases.unpin(lease)
        self._entries[key].pins -= 1

    def step(self, now: float) -> Decision:
        """Make every decision that is possible now."""
        decision = Decision()
        for lease in self.leases.expired(now):
            self.leases.end(lease)
            decision.lapsed.append(lease)
        share = self._share()
        for number, wait in list(self._waits.items()):
            if wait.lease.num_pinned < share:
                self._try_to_grant(number, wait, now, decision)
        covered: dict[str, set[ChunkKey]] = {}
        for wait in list(self._waits.values()):
            if wait.lease.num_pinned < share:
                self._try_to_load(wait, covered.setdefault(wait.lease.id, set()), now, decision)
            wait.is_hit = False
        return decision

    @property
    def num_held(self) -> int:
        """Slots in use: chunks held or being read [chunks]."""
        return len(self._entries) + sum(len(keys) for keys in self._loading.values())

    def report(self) -> dict[str, int]:
        """The buffer's state for people."""
        return {
            "slots": self.slots,
            "held": self.num_held,
            "pinned": sum(entry.pins > 0 for entry in self._entries.values()),
            "waiting": len(self._waits),
            "leases": len(self.leases),
        }

    def _share(self) -> int:
        return max(1, min(self._in_flight, (self.slots - 1) // max(1, len(self.leases))))

    def _try_to_grant(self, number: int, wait: _Wait, now: float, decision: Decision) -> None:
        lease, key = wait.lease, None
        if wait.chunk is not None:
            key = ChunkKey(lease.site, wait.chunk) if ChunkKey(lease.site, wait.chunk) in self._entries else None
        else:
            key = next((k for k in self._entries if k.site == lease.site and lease.lacks(k.chunk, wait.epoch)), None)
        if key is None:
            return
        entry = self._entries[key]
        entry.pins += 1
        entry.served += 1
        self.withdraw(number)
        self.leases.pin(lease)
        self._sending[number] = (key, lease)
        if wait.chunk is None:
            lease.mark(key.chunk, wait.epoch, wait.request)
        elif not lease.is_any:
            lease.place = lease.slice[(key.chunk + 1 - lease.slice.start) % len(lease.slice)]
        lease.last_grant = now
        lease.expires = now + self.leases.lease_seconds
        waited = now - wait.since
        self.counters.served(lease.trainer, lease.site, self._num_bytes(key), entry.served == 1, wait.is_hit, waited)
        decision.grants.append(Grant(number, key))

    def _try_to_load(self, wait: _Wait, covered: set[ChunkKey], now: float, decision: Decision) -> None:
        """Start loading what the request waits for, if there is room; `covered` is for the lease's others."""
        lease = wait.lease
        coming = {key for keys in self._loading.values() for key in keys}
        if wait.chunk is not None:
            wanted = ChunkKey(lease.site, wait.chunk)
            if wanted in coming or wanted in self._entries:
                return
        else:
            for key in coming - covered:
                if key.site == lease.site and lease.lacks(key.chunk, wait.epoch):
                    covered.add(key)
                    return
            wanted = self._most_wanted(lease, wait.epoch, coming)
            if wanted is None:
                return
        held = {other.site: other.slice for other in self.leases}
        group = tuple(
            key
            for key in self._group(wanted)
            if key.chunk in held.get(key.site, ()) and key not in self._entries and key not in coming
        )
        if not self._make_room(len(group), wait, now, decision):
            return
        covered.add(wanted)
        self._loading[wanted] = group
        self._cursors[lease.site] = wanted.chunk + 1
        decision.loads.append(wanted)

    def _most_wanted(self, lease: Lease, epoch: int, coming: set[ChunkKey]) -> ChunkKey | None:
        """Of the chunks that the lease lacks and that are not coming, one that most leases lack; the next in order of those."""
        lacking = ~lease.seen_in(epoch)
        for key in (*coming, *self._entries):
            if key.site == lease.site:
                lacking[key.chunk - lease.slice.start] = False
        if not lacking.any():
            return None
        others = [other for other in self.leases.at(lease.site) if other.is_any]
        wanted_by = np.sum([~other.seen_in(other.epoch) for other in others], axis=0, dtype=np.int64) + 1
        votes = np.where(lacking, wanted_by, 0)
        turn = (self._cursors[lease.site] - lease.slice.start) % len(lease.slice)
        best = (int(np.argmax(np.roll(votes, -turn))) + turn) % len(lease.slice)
        return ChunkKey(lease.site, lease.slice[best])

    def _make_room(self, count: int, wait: _Wait, now: float, decision: Decision) -> bool:
        """Free slots for `count` chunks; False, and nothing is dropped, where too few may be replaced."""
        excess = self.num_held + count - self.slots
        if excess <= 0:
            return True
        ranked = []
        for age, (key, entry) in enumerate(self._entries.items()):
            if entry.pins:
                continue
            leases = self.leases.at(key.site)
            if any(lease is not wait.lease and lease.awaits(key.chunk) and self._holds(lease, now) for lease in leases):
                continue
            is_fresh = not entry.served and now - entry.loaded_at < self.leases.lease_seconds  # who asked may come back
            is_wanted = any(lease.needs(key.chunk, self.slots) for lease in leases)
            ranked.append((is_fresh, is_wanted, age, key))
        if len(ranked) < excess:
            return False
        for *_, key in sorted(ranked)[:excess]:
            if not self._entries.pop(key).served:
                self.counters.wasted(key.site, self._num_bytes(key))
            decision.drops.append(key)
        return True

    def _holds(self, lease: Lease, now: float) -> bool:
        return not lease.num_waiting and now - lease.last_grant < self._hold_seconds
