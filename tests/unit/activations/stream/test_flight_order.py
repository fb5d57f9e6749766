"""The order of chunks, the journal and the account of what was taken: what FlightSource is made of, without servers."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from everyscope.activations.stream.chunk_tracker import ChunkTracker
from everyscope.activations.stream.journal import HEADER_BYTES, RECORD, Journal
from everyscope.activations.stream.order import Chunks
from everyscope.activations.stream.sliced import chunk_spans
from everyscope.base.errors import ConfigError, DamagedData, DataError

SHAPES = [Chunks(*shape) for shape in itertools.product((1, 5, 12, 13, 40), (1, 3, 4, 50), (1, 2, 3, 7))]


@pytest.mark.parametrize("chunks", SHAPES, ids=str)
def test_an_epoch_takes_each_chunk_once_from_all_slices_in_turn(chunks):
    order = [chunks.at(place) for place in range(chunks.num_chunks)]
    assert sorted(order) == list(range(chunks.num_chunks))
    assert [chunk for index in range(chunks.num_slices) for chunk in chunks.slice(index)] == list(range(chunks.num_chunks))
    assert all(chunk in chunks.slice(chunks.owner(chunk)) for chunk in order)
    assert order[chunks.short_place] == chunks.num_chunks - 1
    for index in range(chunks.num_slices):
        assert [chunk for chunk in order if chunk in chunks.slice(index)] == list(chunks.slice(index))
    full = chunks.num_chunks // chunks.num_slices * chunks.num_slices
    for start in range(0, full, chunks.num_slices):
        assert {chunks.owner(chunk) for chunk in order[start : start + chunks.num_slices]} == set(range(chunks.num_slices))


@pytest.mark.parametrize("chunks", SHAPES, ids=str)
def test_places_of_rows_follow_from_any_order_of_chunks(chunks):
    order = list(range(chunks.num_chunks))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        short = order.index(chunks.num_chunks - 1)
        lengths = [chunks.rows_of(chunk)[1] - chunks.rows_of(chunk)[0] for chunk in order]
        want = [(place, offset) for place, length in enumerate(lengths) for offset in range(length)]
        assert [chunks.place_of_row(row, short) for row in range(chunks.num_rows)] == want
        before = sum(lengths[: short + 1])
        assert [chunks.place_of_row(row, None) for row in range(before)] == want[:before]


@pytest.mark.parametrize(("rows", "slices"), itertools.product([1, 4, 9, 30], [1, 2, 5]))
def test_batches_follow_one_another_without_gap(rows, slices):
    chunks = Chunks(23, 4, slices)
    epoch = [row for place in range(chunks.num_chunks) for row in range(*chunks.rows_of(chunks.at(place)))]
    got = [
        chunks.rows_of(chunks.at(span.place))[0] + span.start + offset
        for step in range(12)
        for span in chunk_spans(chunks, step, rows)
        for offset in range(span.rows)
    ]
    assert got == [epoch[index % 23] for index in range(12 * rows)]


CHUNKS = Chunks(35, 10, 2)


def test_a_journal_holds_what_was_appended(tmp_path):
    path = tmp_path / "deep" / "journal"
    journal = Journal(path, "x", CHUNKS)
    for chunk in (2, 0, 3, 1, 1, 0):
        journal.append(chunk)
    with pytest.raises(ConfigError, match="another trainer"):
        Journal(path, "x", CHUNKS)
    journal.close()
    again = Journal(path, "x", CHUNKS)
    assert (again.chunks, again.id) == ([2, 0, 3, 1, 1, 0], journal.id)
    again.append(3)
    again.close()
    with pytest.raises(DataError, match="is of"):
        Journal(path, "y", CHUNKS)
    with pytest.raises(DataError, match="is of"):
        Journal(path, "x", Chunks(35, 7, 2))
    Journal(path, "x", Chunks(35, 10, 1)).close()  # how many servers there are may change
    assert Journal(tmp_path / "other", "x", CHUNKS).id != journal.id


def test_a_torn_record_is_cut_off_and_any_other_damage_is_refused(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "x", CHUNKS)
    for chunk in (2, 0, 3):
        journal.append(chunk)
    journal.close()
    whole = path.read_bytes()
    assert len(whole) == HEADER_BYTES + 3 * RECORD.size
    for length in range(HEADER_BYTES + 2 * RECORD.size, len(whole)):
        path.write_bytes(whole[:length])
        torn = Journal(path, "x", CHUNKS)
        assert torn.chunks == [2, 0]
        torn.append(1)
        torn.close()
        mended = Journal(path, "x", CHUNKS)
        assert mended.chunks == [2, 0, 1]
        mended.close()
    for place in range(len(whole) - RECORD.size):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            Journal(path, "x", CHUNKS)
    path.write_bytes(whole[:HEADER_BYTES] + whole[HEADER_BYTES + RECORD.size :])
    with pytest.raises(DamagedData, match="place 0"):
        Journal(path, "x", CHUNKS)


def test_whatever_servers_answer_each_chunk_is_taken_once_an_epoch():
    for seed in range(100):
        rng = random.Random(seed)
        chunks = Chunks(rng.randrange(1, 40), rng.randrange(1, 5), rng.randrange(1, 4))
        stop, taken = 3 * chunks.num_chunks, []
        tracker, choices = ChunkTracker(chunks, taken), []
        while len(taken) < stop:
            action = rng.random()
            if action < 0.4 and tracker.num_ahead < 6:
                request = tracker.next_request([rng.random() < 0.8 for _ in range(chunks.num_slices)])
                choices += [request] if request else []
            elif action < 0.7 and choices:
                request = choices.pop(rng.randrange(len(choices)))
                if rng.random() < 0.1:
                    tracker.gave_up(request)
                else:
                    tracker.arrived(request, rng.randrange(chunks.num_chunks))  # anything, had or not, ours or not
            elif action < 0.98 and tracker.first() is not None:
                chunk = tracker.first()
                assert tracker.take() == chunk
                taken.append(chunk)
            elif action > 0.99:
                tracker, choices = ChunkTracker(chunks, taken), []
        for epoch in range(3):
            part = taken[epoch * chunks.num_chunks : (epoch + 1) * chunks.num_chunks]
            assert Counter(part) == Counter(range(chunks.num_chunks))


def test_servers_are_asked_evenly_and_told_what_is_here():
    tracker = ChunkTracker(Chunks(12, 1, 3), [0, 4])
    asks = [tracker.next_request([True, True, True]) for _ in range(4)]
    assert sorted(request.slice for request in asks) == [0, 1, 2, 2]
    assert asks[0].slice == 2  # the most is left there
    assert tracker.arrived(asks[0], 9)
    epoch, seen = tracker.seen(2)
    assert epoch == 0
    assert np.flatnonzero(seen).tolist() == [1]
    assert np.flatnonzero(tracker.seen(0)[1]).tolist() == [0]
