import itertools
import math

import fsspec
import numpy as np
import pytest
import torch

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.activations.stream.local import ArraySource, LocalSource, spans
from everyscope.activations.stream.source import Source
from everyscope.base.errors import ConfigError, DamagedData, DataError, NonFinite, ShapeMismatch

SIZES, D_IN = (7, 11, 2), 3
NUM_ROWS = sum(SIZES)


@pytest.fixture(params=["float32", "bfloat16"])
def stored(request, tmp_path):
    """A site's folder, and its rows in order as float32."""
    rows = torch.randn(NUM_ROWS, D_IN, generator=torch.Generator().manual_seed(0)).to(getattr(torch, request.param))
    start = 0
    for index, size in enumerate(SIZES):
        places = np.arange(size)
        with new_activation_shard(shard_path(tmp_path, index), "embed", size, D_IN, request.param, 8, {}) as writer:
            writer.put(rows[start : start + size], places, places, places % 8)
        start += size
    seal_folder(tmp_path, len(SIZES), site="embed/layer_0", config={}, parents={}, version="0")
    return tmp_path, rows.float()


@pytest.mark.parametrize("rows", [1, 3, 7, 19, 20, 21, 45])
def test_batches_are_the_rows_over_and_over(stored, rows):
    folder, want = stored
    source: Source = LocalSource(folder)
    steps = 2 * math.ceil(NUM_ROWS / rows) + 2
    got = torch.cat([source.batch(step, rows) for step in range(steps)])
    assert got.dtype == torch.float32
    assert torch.equal(got, want.repeat(steps * rows // NUM_ROWS + 1, 1)[: steps * rows])


def test_a_batch_depends_on_its_number_alone(stored):
    folder, _ = stored
    inorder, table = LocalSource(folder), torch.randn(NUM_ROWS, D_IN)
    batches = [inorder.batch(step, 6) for step in range(9)]
    array = [ArraySource(table, seed=1).batch(step, 6) for step in range(9)]
    fresh, other = LocalSource(folder), ArraySource(table, seed=1)
    for step in (8, 0, 5, 5, 3):
        assert torch.equal(fresh.batch(step, 6), batches[step])
        assert torch.equal(other.batch(step, 6), array[step])


@pytest.mark.parametrize(("num_rows", "rows"), itertools.product([1, 4, 9], [1, 2, 9, 30]))
def test_spans_cover_step_after_step_without_gap(num_rows, rows):
    seen = [row for step in range(12) for start, stop in spans(step, rows, num_rows) for row in range(start, stop)]
    assert seen == [row % num_rows for row in range(12 * rows)]


@pytest.mark.parametrize("read_ahead_bytes", [0, 1, 60, 10**9])
@pytest.mark.parametrize("rows", [1, 6, 20, 47])
def test_reading_ahead_changes_nothing(stored, read_ahead_bytes, rows):
    folder, want = stored
    source, batch = LocalSource(folder, read_ahead_bytes=read_ahead_bytes), torch.empty(rows, D_IN)
    for step in (0, 1, 2, 3, 9, 4, 5, 0, 100, 101):
        source.batch_into(step, batch)
        assert torch.equal(batch, want[torch.arange(step * rows, (step + 1) * rows) % NUM_ROWS])
        assert torch.equal(source.batch(step, rows), batch)


def test_reading_goes_ahead_of_batches_in_strides(stored, monkeypatch):
    source, asked = LocalSource(stored[0], read_ahead_bytes=8 * D_IN * 4), []
    monkeypatch.setattr(type(source.shards), "prepare", lambda shards, start, stop: asked.append((start, stop)))
    rows_ahead = source._rows_ahead
    for step in range(40):
        source.batch(step, 1)
    first = [row for start, stop in asked for row in range(start, stop)][:40]
    assert first == [row % NUM_ROWS for row in range(40)]  # every row once an epoch, none twice
    assert len(asked) <= 40 // (rows_ahead // 2) + 3


def test_a_batch_goes_into_a_buffer_of_any_float(stored):
    folder, want = stored
    for dtype in (torch.bfloat16, torch.float64):
        batch = torch.empty(20, D_IN, dtype=dtype)
        LocalSource(folder).batch_into(0, batch)
        assert torch.equal(batch, want.to(dtype))
    with pytest.raises(ShapeMismatch, match="to fill"):
        LocalSource(folder).batch_into(0, torch.empty(5, D_IN + 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_pinned_batches_need_a_gpu(stored):
    with pytest.raises(ConfigError, match="torch finds none"):
        LocalSource(stored[0], is_pinned=True)


def test_an_address_is_as_good_as_a_path(stored, monkeypatch, tmp_path):
    monkeypatch.setenv("EVERYSCOPE_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    for path in stored[0].iterdir():
        if path.is_file():
            files.pipe_file(f"/local_source/{path.name}", path.read_bytes())
    near, far = LocalSource(str(stored[0])), LocalSource("memory://local_source")
    assert near.identity == far.identity
    assert torch.equal(near.batch(3, 11), far.batch(3, 11))
    files.rm("/local_source", recursive=True)


def test_local_source_knows_its_data(stored):
    folder, rows = stored
    source = LocalSource(folder)
    assert (source.d_in, source.num_rows) == (D_IN, NUM_ROWS)
    assert source.statistics.scale == pytest.approx(
        math.sqrt(math.fsum((rows.double() ** 2).flatten().tolist()) / NUM_ROWS), rel=1e-12
    )
    assert source.identity == source.shards.identity == LocalSource(folder).identity


def test_a_damaged_shard_is_refused_by_name(stored):
    folder, _ = stored
    path = shard_path(folder, 1)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    source = LocalSource(folder)
    source.batch(0, 7)
    with pytest.raises(DamagedData, match=r"shard_00001\.safetensors"):
        source.batch(1, 7)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, torch.bfloat16, torch.float32])
def test_an_array_gives_each_row_once_an_epoch(kind):
    values = np.random.default_rng(0).normal(size=(5000, 2))
    table = torch.from_numpy(values).to(kind) if isinstance(kind, torch.dtype) else values.astype(kind)
    as_floats = torch.as_tensor(table).float()
    source: Source = ArraySource(table, seed=3)
    epoch = torch.cat([source.batch(step, 500) for step in range(10)])
    assert epoch.dtype == torch.float32
    assert not torch.equal(epoch, as_floats)
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, as_floats.tolist()))
    assert source.statistics.scale == pytest.approx(
        math.sqrt(math.fsum((as_floats.double() ** 2).flatten().tolist()) / 5000), rel=1e-12
    )


def test_identity_of_an_array_is_content_and_order():
    table = torch.randn(100, 4)
    changed = table.clone()
    changed[99, 3] += 1
    identities = [ArraySource(x, seed).identity for x, seed in ((table, 0), (table, 1), (changed, 0), (table.reshape(50, 8), 0))]
    assert len(set(identities)) == 4
    assert ArraySource(table.numpy().copy(), 0).identity == identities[0]


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1), (0, 3), (3, 0)])
def test_arrays_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeMismatch, match="expected \\[rows, d_in\\]"):
        ArraySource(np.zeros(shape, np.float32))


def test_arrays_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="int64"):
        ArraySource(np.zeros((2, 2), np.int64))
    table = torch.zeros(6000, 2)
    table[5000, 1] = torch.nan
    with pytest.raises(NonFinite, match="row 5000 "):
        ArraySource(table)


def test_arrays_of_every_layout_are_the_same_rows():
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    want = ArraySource(rows)
    frozen = rows.copy()
    frozen.flags.writeable = False
    for form in (rows[::-1].copy()[::-1], np.asfortranarray(rows), rows.astype(">f4"), frozen, torch.from_numpy(rows)):
        got = ArraySource(form)
        assert got.identity == want.identity
        assert torch.equal(got.batch(0, 20), want.batch(0, 20))


@pytest.mark.parametrize("odd", [[[1.0, 2.0]], "rows", np.array([[None]]), np.zeros(3, [("a", "f4")]), np.array([["1.5"]])])
def test_what_is_no_array_of_numbers_is_one_line(odd):
    with pytest.raises(DataError, match=r"activations are .*; convert"):
        ArraySource(odd)
