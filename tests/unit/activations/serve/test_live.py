"""Buckets that are made when they are asked for, cut into chunks and kept by the ring; a stand-in counts what it makes."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from served_rows import row_ids

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.leases import ChunkKey
from everyscope.activations.serve.live import LiveOrigin
from everyscope.activations.serve.run import Serving, ring_of, serving
from everyscope.activations.shards.format import CARRIER
from everyscope.activations.shards.statistics import Sums
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.order import Chunks
from everyscope.base.errors import ConfigError

WIDTHS = {"resid_post/layer_0": 6, "mlp_out/layer_1": 4}
SITE, OTHER = WIDTHS
SIZES = (370, 240, 31, 290)
NUM_ROWS = sum(SIZES)


class Made:
    """Rows that carry their number, in buckets; counts how often each bucket is made."""

    identity = "made"

    def __init__(self, dtype: str = "float32", sizes: tuple[int, ...] = SIZES) -> None:
        self.dtype, self.widths = dtype, WIDTHS
        self.borders = np.cumsum([0, *sizes]).tolist()
        self.made: Counter[int] = Counter()
        self.table = {}
        for site, width in WIDTHS.items():
            number = torch.arange(self.borders[-1])
            rows = torch.randn(len(number), width, generator=torch.Generator().manual_seed(len(site)))
            rows[:, 0], rows[:, 1] = number // 100, number % 100
            stored = rows.to(torch.bfloat16).view(torch.uint16) if dtype == "bfloat16" else rows
            self.table[site] = stored.numpy()
        sums = {site: Sums(width, 1) for site, width in WIDTHS.items()}
        for site, total in sums.items():
            total.add(np.full((9, WIDTHS[site]), 2 / WIDTHS[site] ** 0.5, np.float32), np.zeros(9, np.int64))
        self.statistics = {site: total.statistics() for site, total in sums.items()}

    def rows(self, bucket: int) -> dict[str, np.ndarray]:
        self.made[bucket] += 1
        return {site: rows[self.borders[bucket] : self.borders[bucket + 1]].copy() for site, rows in self.table.items()}


def config_of(**changes) -> ServeConfig:
    fields = {"shards": Path("live"), "listen": "127.0.0.1:0", "chunk_rows": 100, "wait_seconds": 0.5, "drain_seconds": 10.0}
    return ServeConfig(**(fields | changes))


CHUNK_ROWS = [1, 7, 60, 100, 370, 400, 640, 5000]  # below, at and above the sizes of buckets; some divide them, most do not


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_rows", CHUNK_ROWS)
def test_chunks_are_the_rows_in_their_order_whichever_is_asked_first(dtype, chunk_rows):
    buckets = Made(dtype)
    chunks, rng = Chunks(NUM_ROWS, chunk_rows), np.random.default_rng(0)
    origin = LiveOrigin(buckets, config_of(chunk_rows=chunk_rows))
    for chunk in rng.permutation(chunks.num_chunks)[:60].tolist():
        key = ChunkKey(SITE, chunk)
        found = origin.read(key)
        assert set(found) == set(origin.group(key)) >= {key}
        for (site, number), rows in found.items():
            start, stop = chunks.rows_of(number)
            assert rows.dtype == CARRIER[dtype]
            assert np.array_equal(rows, buckets.table[site][start:stop])


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("chunk_rows", CHUNK_ROWS)
def test_groups_part_the_chunks_of_a_slice_and_forward_each_bucket_is_made_once(chunk_rows, slices):
    chunks = Chunks(NUM_ROWS, chunk_rows, slices)
    for index in range(slices):
        buckets, held = Made(), chunks.slice(index)
        if not held:
            continue
        origin = LiveOrigin(buckets, config_of(chunk_rows=chunk_rows, slice=f"{index}/{slices}"))
        groups = {origin.group(ChunkKey(site, chunk)) for site in WIDTHS for chunk in held}
        members = [key for group in groups for key in group]
        assert sorted(members) == sorted(ChunkKey(site, chunk) for site in WIDTHS for chunk in held)
        for group in sorted(groups, key=lambda group: group[0].chunk):
            assert all(origin.group(key) == group for key in group)
            origin.read(group[0])
        assert set(buckets.made.values()) == {1}
        first, last = chunks.rows_of(held[0])[0], chunks.rows_of(held[-1])[1]
        touched = {b for b in range(len(SIZES)) if buckets.borders[b] < last and first < buckets.borders[b + 1]}
        assert set(buckets.made) == touched


def test_a_site_whose_trainer_comes_later_needs_no_second_run():
    buckets = Made()
    origin = LiveOrigin(buckets, config_of())
    origin.read(ChunkKey(SITE, 0))
    origin.read(ChunkKey(OTHER, 1))
    assert buckets.made == {0: 1}


def test_a_chunk_lets_go_of_its_bucket():
    rows = LiveOrigin(Made(), config_of()).read(ChunkKey(SITE, 0))
    assert all(array.base is None for array in rows.values())


def test_a_buffer_that_does_not_hold_two_buckets_is_refused_with_the_size_that_does():
    needed = 2 * 4 * 2 * 100 * 6 * 4  # two buckets, at most four chunks end in one, two sites, the larger chunk
    with pytest.raises(ConfigError, match=rf"set buffer_bytes={needed} or more"):
        LiveOrigin(Made(), config_of(buffer_bytes=needed - 1))
    config = config_of(buffer_bytes=needed)
    assert ring_of(config, LiveOrigin(Made(), config)).slots == 16
    with pytest.raises(ConfigError, match="read_threads=2"):
        LiveOrigin(Made(), config_of(read_threads=2))


class Start:
    """Live servers on this host."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def __call__(self, buckets: Made, **changes) -> Serving:
        config = config_of(**changes)
        return self.stack.enter_context(serving(config, LiveOrigin(buckets, config)))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    with ExitStack() as stack:
        yield Start(stack)


def url(*servers: Serving, site: str = SITE) -> str:
    return f"flight://{','.join(f'127.0.0.1:{server.port}' for server in servers)}/{site}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_rows", [60, 100, 400])
def test_a_client_gets_all_rows_epoch_after_epoch(live, dtype, chunk_rows):
    buckets = Made(dtype)
    server = live(buckets, chunk_rows=chunk_rows, buffer_bytes=80_000)
    with FlightSource(url(server)) as source:
        assert not source.reads_files
        assert (source.num_rows, source.d_in) == (NUM_ROWS, 6)
        assert source.statistics.scale == pytest.approx(2, rel=1e-6)
        rows = torch.cat([source.batch(step, 64) for step in range(-(-2 * NUM_ROWS // 64))])
    whole = torch.from_numpy(buckets.table[SITE])
    whole = whole if dtype == "float32" else whole.view(torch.bfloat16).float()
    assert torch.equal(rows[: 2 * NUM_ROWS], torch.cat([whole, whole]))


def test_two_servers_with_a_slice_each_hold_a_site_together(live):
    made = Made(), Made()
    servers = [live(buckets, slice=f"{index}/2") for index, buckets in enumerate(made)]
    with FlightSource(url(*servers), ahead=1) as source:  # chunks asked ahead overtake one another, and are dear then
        rows = torch.cat([source.batch(step, 49) for step in range(NUM_ROWS // 49)])
    assert Counter(row_ids(rows)) == Counter(range(NUM_ROWS))
    assert all(set(buckets.made.values()) == {1} for buckets in made)


@pytest.mark.parametrize("order", ["fixed", "any"])
def test_trainers_of_all_sites_share_one_run_of_the_model(live, tmp_path, order):
    """Both have their lease before the first row is made; from there on each bucket is made once, in a buffer of two."""
    buckets = Made()
    server = live(buckets, buffer_bytes=16 * 100 * 6 * 4, hold_seconds=60.0)
    started, errors = threading.Barrier(2, timeout=60), []

    def train(site: str) -> None:
        try:
            journal = tmp_path / site.replace("/", "_") if order == "any" else None
            with FlightSource(url(server, site=site), order=order, journal=journal, ahead=1) as source:
                source.batch(0, 10)
                started.wait()
                rows = torch.cat([source.batch(step, 19) for step in range(NUM_ROWS // 19)])
            assert Counter(row_ids(rows)) == Counter(range(NUM_ROWS))
        except BaseException as error:
            started.abort()
            errors.append(error)

    threads = [threading.Thread(target=train, args=(site,)) for site in WIDTHS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(buckets.made) == set(range(len(SIZES)))
    assert max(buckets.made.values()) == 1, buckets.made


def test_a_laggard_is_waited_for_until_hold_seconds_and_memory_stays_bounded():
    """The pure ring over real groups: simulated time, a buffer of two buckets."""
    buckets, hold = Made(sizes=(200,) * 6), 5.0
    config = config_of(buffer_bytes=8 * 100 * 6 * 4, hold_seconds=hold, lease_seconds=1000.0)
    ring = ring_of(config, LiveOrigin(buckets, config))
    assert ring.slots == 8
    ring.lease("fast", "fast", SITE, False, now=0)
    ring.lease("slow", "slow", OTHER, False, now=0)
    loads: list[ChunkKey] = []

    def request(lease: str, chunk: int, now: float) -> bool:
        """Whether the chunk comes without time passing."""
        wait = ring.request(lease, chunk, now=now)
        for _ in range(3):
            decision = ring.step(now)
            assert ring.num_held <= ring.slots
            for key in decision.loads:
                loads.append(key)
                ring.loaded(key, now)
            for grant in decision.grants:
                ring.sent(grant.wait)
        if ring.is_waiting(wait):
            ring.withdraw(wait)
            return False
        return True

    assert request("slow", 0, 0.0)
    place = 0
    while request("fast", place, 1.0):
        place += 1
    assert 4 <= place < 12, "the fast one goes ahead as far as two buckets reach"
    assert not request("fast", place, hold - 0.01)
    assert loads[0].site == OTHER
    assert request("slow", 1, hold - 0.005), "what is held for the laggard is there"
    assert request("slow", 2, hold - 0.004)
    before = len(loads)
    assert request("fast", place, hold), "the laggard has gone on by a bucket, and so there is room for the next"
    assert not request("fast", 11, 2 * hold - 0.01)
    assert request("fast", 11, 2 * hold + 0.01), "nobody is waited for any longer than hold_seconds"
    assert len(loads) == before + 2
    assert request("slow", 3, 2 * hold + 1.0), "and what the laggard missed is made again"
