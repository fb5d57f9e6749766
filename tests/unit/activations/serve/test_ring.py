"""The ring's laws, in simulated time: random servers, trainers, speeds, kills and restarts, all from seeds."""

import contextlib
import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from everyscope.activations.serve.counters import ServerCounters, SiteCounts
from everyscope.activations.serve.leases import ChunkKey, Leases, Refused
from everyscope.activations.serve.ring import Ring
from everyscope.activations.stream.chunk_tracker import ChunkRequest, ChunkTracker
from everyscope.activations.stream.order import Chunks
from everyscope.activations.stream.wire import Refusal

SITE, LEASE_SECONDS = "resid_post/layer_0", 30.0
SCHEDULES = 240


def new_ring(slots: int, part: range, hold: float = 0.0, in_flight: int = 3, group=lambda key: (key,), sites=(SITE,)) -> Ring:
    counters = ServerCounters({site: SiteCounts() for site in sites})
    leases = Leases(LEASE_SECONDS, dict.fromkeys(sites, part))
    return Ring(slots, leases, counters, lambda key: 1, group, in_flight, hold)


@dataclass
class Clock:
    """Events in order of time."""

    now: float = 0.0
    events: list = field(default_factory=list)
    numbers: itertools.count = field(default_factory=itertools.count)

    def after(self, delay: float, function, *args) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.numbers), function, args))

    def run(self, is_done, limit: float) -> None:
        while self.events and not is_done():
            self.now, _, function, args = heapq.heappop(self.events)
            assert self.now < limit, "no progress: somebody starves"
            function(*args)


class Server:
    """A ring with reads and sends that take time; it forgets everything when it is killed."""

    def __init__(self, clock: Clock, rng: random.Random, part: range, slots: int, hold: float) -> None:
        self.clock, self.rng, self.part, self.slots, self.hold = clock, rng, part, slots, hold
        self.totals: list[SiteCounts] = []
        self.start()

    def start(self) -> None:
        self.ring = new_ring(self.slots, self.part, self.hold)
        self.is_up, self.buffered, self.calls = True, set(), {}

    def kill(self) -> None:
        self.is_up = False
        self.totals.append(self.ring.counters.sites[SITE])
        for failed in list(self.calls.values()):
            self.clock.after(0.01, failed, None)

    def call(self, lease: str, chunk: int | None, epoch: int, request: int, answer) -> int:
        number = self.ring.request(lease, chunk, epoch, request, now=self.clock.now)
        self.calls[number] = answer
        self.step()
        return number

    def step(self) -> None:
        ring = self.ring
        decision = ring.step(self.clock.now)
        self.buffered -= set(decision.drops)
        for grant in decision.grants:
            assert grant.key in self.buffered
            self.clock.after(self.rng.expovariate(10), self.deliver, ring, grant)
        for key in decision.loads:
            self.clock.after(self.rng.expovariate(5), self.load, ring, key)
        for number in [n for n in self.calls if not ring.is_waiting(n) and n not in ring._sending]:
            self.clock.after(0.01, self.calls.pop(number), None)  # its lease has ended
        assert ring.num_held <= ring.slots
        counts = ring.counters.sites[SITE]
        assert counts.bytes_served + counts.bytes_wasted >= counts.bytes_read - counts.bytes_fresh

    def load(self, ring: Ring, key: ChunkKey) -> None:
        if ring is self.ring and self.is_up:
            self.buffered |= set(ring.loaded(key, self.clock.now))
            self.step()

    def deliver(self, ring: Ring, grant) -> None:
        if ring is not self.ring or not self.is_up:
            return
        answer = self.calls.pop(grant.wait, None)
        ring.sent(grant.wait)
        if answer is not None:
            answer(grant.key.chunk)
        self.step()


def require(refused: Refused, *expected: Refusal) -> None:
    assert refused.refusal in expected, refused


class Trainer:
    """Asks some chunks ahead and takes one after another; its journal (or its count of steps) is all that survives a kill."""

    def __init__(self, clock, rng, name, chunks, servers, speed, is_any, epochs, slack):
        self.clock, self.rng, self.name, self.chunks, self.servers = clock, rng, name, chunks, servers
        self.pause, self.is_any, self.stop = 1 / speed, is_any, epochs * chunks.num_chunks
        self.slack = slack  # chunks behind which a checkpoint may lie
        self.journal: list[int] = []
        self.life = 0

    @property
    def is_done(self) -> bool:
        return len(self.journal) >= self.stop

    def start(self) -> None:
        self.life += 1
        self.leases: dict[int, tuple[Ring, str]] = {}
        self.tracker = ChunkTracker(self.chunks, self.journal)
        self.coming: dict[int, bool] = {}
        self.place = len(self.journal)
        self.clock.after(0, self.pump, self.life)
        self.clock.after(self.pause, self.consume, self.life)

    def kill(self) -> None:
        self.life += 1
        for _, server in enumerate(self.servers):
            for number, answer in list(server.calls.items()):
                if getattr(answer, "trainer", None) is self:
                    server.calls.pop(number)
                    server.ring.withdraw(number)
        if not self.is_any:
            del self.journal[max(0, len(self.journal) - self.rng.randrange(self.slack + 1)) :]

    def lease(self, part: int) -> str:
        server = self.servers[part]
        if part not in self.leases or self.leases[part][0] is not server.ring:
            epoch, seen = self.tracker.seen(part) if self.is_any else (0, None)
            name = f"{self.name}.{self.life}.{self.clock.now}.{self.rng.random()}"
            server.ring.lease(name, self.name, SITE, self.is_any, epoch, seen, now=self.clock.now)
            self.leases[part] = (server.ring, name)
        return self.leases[part][1]

    def pump(self, life: int) -> None:
        """Keep three chunks ahead."""
        if life != self.life or self.is_done:
            return
        if self.is_any:
            while self.tracker.num_ahead < 3:
                request = self.tracker.next_request([server.is_up for server in self.servers])
                if request is None:
                    break
                self.wish(life, request)
        else:
            for place in range(self.place, min(self.place + 3, self.stop)):
                if place not in self.coming:
                    self.coming[place] = False
                    self.certain(life, place)

    def wish(self, life: int, request: ChunkRequest) -> None:
        if life != self.life:
            return
        server = self.servers[request.slice]

        def answer(chunk: int | None) -> None:
            if life != self.life:
                return
            if chunk is None or self.rng.random() < 0.02:  # lost on the way
                self.tracker.gave_up(request)
            else:
                self.tracker.arrived(request, chunk)
            self.clock.after(0.01, self.pump, life)

        answer.trainer = self
        try:
            assert server.is_up
            server.call(self.lease(request.slice), None, request.epoch, request.number, answer)
        except AssertionError:
            self.tracker.gave_up(request)
            self.clock.after(0.5, self.pump, life)
        except Refused as refused:
            require(refused, Refusal.LEASE, Refusal.EXHAUSTED, Refusal.BUSY)
            self.leases.pop(request.slice, None)
            self.clock.after(0.5, self.wish, life, request)

    def certain(self, life: int, place: int) -> None:
        if life != self.life:
            return
        chunk = self.chunks.at(place % self.chunks.num_chunks)
        part = self.chunks.owner(chunk)

        def answer(got: int | None) -> None:
            if life != self.life:
                return
            if got is None:
                self.clock.after(0.3, self.certain, life, place)
            else:
                assert got == chunk
                self.coming[place] = True

        answer.trainer = self
        if not self.servers[part].is_up:
            self.clock.after(0.3, self.certain, life, place)
            return
        try:
            self.servers[part].call(self.lease(part), chunk, 0, 0, answer)
        except Refused as refused:
            require(refused, Refusal.LEASE, Refusal.BUSY)
            self.leases.pop(part, None)
            self.clock.after(0.3, self.certain, life, place)

    def consume(self, life: int) -> None:
        if life != self.life or self.is_done:
            return
        if self.is_any:
            chunk = self.tracker.first()
            if chunk is not None:
                self.journal.append(chunk)  # before it is used
                assert self.tracker.take() == chunk
        elif self.coming.get(self.place):
            self.journal.append(self.chunks.at(self.place % self.chunks.num_chunks))
            self.place += 1
        self.pump(life)
        self.clock.after(self.pause * self.rng.uniform(0.5, 1.5), self.consume, life)


def simulate(seed: int, *, kills: bool = True):
    rng, clock = random.Random(seed), Clock()
    count = rng.choice([1, 1, 2, 3])
    chunks = Chunks(rng.randrange(5, 60), rng.choice([1, 2, 3]), count)
    is_any, hold = rng.random() < 0.5, rng.choice([0.0, 0.0, 5.0])
    num_trainers, epochs = rng.randrange(1, 5), rng.choice([1, 2, 3])
    slots = rng.randrange(num_trainers + 2, num_trainers + 14)
    servers = [Server(clock, rng, chunks.slice(index), slots, hold) for index in range(count)]
    speeds = [rng.choice([1, 0.5, 0.1, 2]) for _ in range(num_trainers)]
    trainers = [Trainer(clock, rng, f"t{n}", chunks, servers, speed, is_any, epochs, slack=4) for n, speed in enumerate(speeds)]
    for trainer in trainers:
        clock.after(rng.choice([0, 0, rng.uniform(0, 40)]), trainer.start)  # some join late
    for _ in range(rng.randrange(6) if kills else 0):
        victim, when, back = rng.choice([*servers, *trainers]), rng.uniform(1, 120), rng.choice([0.1, 3, 50])

        def kill(victim=victim, back=back) -> None:
            is_alive = victim.is_up if isinstance(victim, Server) else victim.life % 2 == 1
            if is_alive:
                victim.kill()
                clock.after(back, victim.start)

        clock.after(when, kill)
    clock.run(lambda: all(trainer.is_done for trainer in trainers), limit=50_000)
    for server in servers:
        server.totals.append(server.ring.counters.sites[SITE])
    return chunks, servers, trainers, epochs


@pytest.mark.parametrize(
    "seeds", [range(start, start + 40) for start in range(0, SCHEDULES, 40)], ids=lambda seeds: f"{seeds[0]}"
)
def test_each_trainer_gets_each_row_exactly_once_an_epoch_whatever_dies(seeds):
    for seed in seeds:
        chunks, servers, trainers, epochs = simulate(seed)
        for trainer in trainers:
            assert trainer.is_done, f"seed {seed}: {trainer.name} starves"
            for epoch in range(epochs):
                taken = trainer.journal[epoch * chunks.num_chunks : (epoch + 1) * chunks.num_chunks]
                rows = Counter(row for chunk in taken for row in range(*chunks.rows_of(chunk)))
                assert rows == Counter(range(chunks.num_rows)), f"seed {seed}: {trainer.name}, epoch {epoch}"
            if not trainer.is_any:
                assert trainer.journal == [chunks.at(p % chunks.num_chunks) for p in range(trainer.stop)]
        for server in servers:
            for counts in server.totals:
                # A chunk may be wasted if who asked for it was killed and did not come back in time; never otherwise.
                assert counts.bytes_served + counts.bytes_wasted >= counts.bytes_read - counts.bytes_fresh, f"seed {seed}"


def test_no_byte_is_read_in_vain_while_nobody_is_killed():
    for seed in range(1000, 1060):
        _, servers, trainers, _ = simulate(seed, kills=False)
        assert all(trainer.is_done for trainer in trainers)
        for server in servers:
            assert all(counts.bytes_wasted == 0 and counts.amortisation >= 1 for counts in server.totals), f"seed {seed}"


@pytest.mark.parametrize("is_any", [False, True])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_three_trainers_within_the_window_share_nearly_every_read(is_any, num_servers):
    for seed in range(5):
        rng, clock = random.Random(seed), Clock()
        chunks = Chunks(60, 1, num_servers)
        servers = [Server(clock, rng, chunks.slice(index), 62 // num_servers, 0.0) for index in range(num_servers)]
        trainers = [Trainer(clock, rng, f"t{v}", chunks, servers, v, is_any, 1, 0) for v in (1, 0.5, 0.1)]
        for trainer in trainers:
            trainer.start()
        clock.run(lambda trainers=trainers: all(trainer.is_done for trainer in trainers), 10_000)
        for server in servers:
            assert server.ring.counters.sites[SITE].amortisation > 2.9


@pytest.mark.parametrize("is_any", [False, True])
def test_laggards_that_hold_the_others_back_make_a_small_buffer_do(is_any):
    """With hold_seconds the fastest waits, and each chunk is read about once although the buffer holds a sixth of them."""
    rng, clock = random.Random(0), Clock()
    chunks = Chunks(60, 1)
    server = Server(clock, rng, chunks.slice(0), 10, 1000.0)
    trainers = [Trainer(clock, rng, f"t{v}", chunks, [server], v, is_any, 1, 0) for v in (1, 0.5, 0.1)]
    for trainer in trainers:
        trainer.start()
    clock.run(lambda: all(trainer.is_done for trainer in trainers), 10_000)
    assert server.ring.counters.sites[SITE].amortisation > 2.5


def test_who_stays_silent_holds_nobody_back_for_long():
    ring, now = new_ring(4, range(100), hold=5.0), 0.0
    ring.lease("a", "fast", SITE, False, now=now)
    ring.lease("b", "dead", SITE, False, now=now)
    served = 0
    for step in range(400):
        now = step * 0.5
        if served == step // 2:  # else it still waits
            ring.request("a", served, now=now)
        decision = ring.step(now)
        for key in decision.loads:
            ring.loaded(key, now)
        for grant in [*decision.grants, *ring.step(now).grants]:
            ring.sent(grant.wait)
            served += 1
        if served >= 20:
            break
    assert served >= 20
    assert now < 5.0 + 20


def test_a_stalled_trainer_takes_no_more_than_its_share():
    ring = new_ring(5, range(100), in_flight=4)
    ring.lease("stalled", "stalled", SITE, False, now=0)
    ring.lease("well", "well", SITE, False, now=0)
    for chunk in range(8):
        ring.request("stalled", chunk, now=0)
    for _ in range(10):
        for key in ring.step(0).loads:
            ring.loaded(key, 0)
    assert ring.report()["pinned"] == 2
    for chunk in range(50, 90):
        wait = ring.request("well", chunk, now=1)
        for _ in range(3):
            decision = ring.step(1)
            for key in decision.loads:
                ring.loaded(key, 1)
            for grant in decision.grants:
                ring.sent(grant.wait)
        assert not ring.is_waiting(wait)
        assert ring.num_held <= 5


def test_a_repeated_wish_gets_the_same_chunk_and_a_new_lease_ends_the_old():
    ring = new_ring(6, range(10))
    ring.lease("one", "t", SITE, True, now=0)
    first = ring.request("one", None, 0, 7, now=0)
    (key,) = ring.step(0).loads
    ring.loaded(key, 0)
    assert [(g.wait, g.key) for g in ring.step(0).grants] == [(first, key)]
    again = ring.request("one", None, 0, 7, now=0)
    assert [(g.wait, g.key) for g in ring.step(0).grants] == [(again, key)]
    seen = np.ones(10, bool)
    seen[4] = False
    ring.lease("two", "t", SITE, True, 0, seen, now=1)
    with pytest.raises(Refused, match="another process") as replaced:
        ring.request("one", None, 0, 8, now=1)
    assert replaced.value.refusal is Refusal.REPLACED
    ring.request("two", None, 0, 1, now=1)
    assert ring.step(1).loads == [ChunkKey(SITE, 4)]
    with pytest.raises(Refused) as exhausted:
        ring.request("two", None, 0, 2, now=1)
    assert exhausted.value.refusal is Refusal.EXHAUSTED


def test_leases_end_by_silence_and_are_limited_by_the_slots():
    ring = new_ring(3, range(10))
    ring.lease("a", "a", SITE, False, now=0)
    ring.lease("b", "b", SITE, False, now=0)
    with pytest.raises(Refused, match="larger buffer") as busy:
        ring.lease("c", "c", SITE, False, now=LEASE_SECONDS / 2)
    assert busy.value.refusal is Refusal.BUSY
    ring.request("a", 0, now=LEASE_SECONDS / 2)
    ring.lease("c", "c", SITE, False, now=LEASE_SECONDS + 1)
    with pytest.raises(Refused) as lapsed:
        ring.request("b", 0, now=LEASE_SECONDS + 1)
    assert lapsed.value.refusal is Refusal.LEASE


def test_a_group_comes_as_one_and_only_for_sites_with_trainers():
    """What a language model gives: chunks of one bucket at all sites in one pass."""
    sites = ("a", "b", "c")

    def bucket(key: ChunkKey) -> tuple[ChunkKey, ...]:
        start = key.chunk // 2 * 2
        return tuple(ChunkKey(site, chunk) for site in sites for chunk in (start, start + 1))

    ring = new_ring(9, range(8), hold=1000.0, group=bucket, sites=sites)
    ring.lease("x", "x", "a", False, now=0)
    ring.lease("y", "y", "b", False, now=0)
    passes = 0
    for chunk in range(8):
        for lease in "xy":
            wait = ring.request(lease, chunk, now=chunk)
            for _ in range(2):
                decision = ring.step(chunk)
                for key in decision.loads:
                    passes += 1
                    assert {member.site for member in ring.loaded(key, chunk)} == {"a", "b"}
                for grant in decision.grants:
                    ring.sent(grant.wait)
            assert not ring.is_waiting(wait)
    assert passes == 4


def test_a_read_that_fails_is_told_to_those_who_wait_for_it():
    ring = new_ring(6, range(10))
    ring.lease("a", "a", SITE, False, now=0)
    bad, good = ring.request("a", 3, now=0), ring.request("a", 4, now=0)
    loads = ring.step(0).loads
    assert loads == [ChunkKey(SITE, 3), ChunkKey(SITE, 4)]
    assert ring.failed(loads[0]) == [bad]
    ring.loaded(loads[1], 0)
    assert [grant.wait for grant in ring.step(0).grants] == [good]
    assert ring.num_held == 1


def test_groups_that_overlap_what_is_there_or_coming_bring_nothing_twice():
    sites = ("a", "b")
    everything = tuple(ChunkKey(site, chunk) for site in sites for chunk in range(4))
    for seed in range(100):
        rng, coming = random.Random(seed), []
        ring = new_ring(8, range(4), group=lambda key: (*everything, ChunkKey("a", 9)), sites=sites)
        ring.lease("x", "x", "a", False, now=0)
        ring.lease("y", "y", "b", True, now=0)
        sending, there = [], set()
        for now in range(200):
            with contextlib.suppress(Refused):
                if rng.random() < 0.5:
                    ring.request("x", rng.randrange(4), now=now)
                else:
                    ring.request("y", None, now // 50, now, now=now)
            if coming and rng.random() < 0.6:
                kept = ring.loaded(coming.pop(rng.randrange(len(coming))), now)
                assert not there & set(kept)
                assert set(kept) <= set(everything)
                there |= set(kept)
            if sending and rng.random() < 0.6:
                ring.sent(sending.pop(rng.randrange(len(sending))))
            decision = ring.step(now)
            there -= set(decision.drops)
            coming += decision.loads
            sending += [grant.wait for grant in decision.grants]
            assert all(grant.key in there for grant in decision.grants)
            assert ring.num_held <= ring.slots
