import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from everyscope.activations.shards.manifest import read_sidecar
from everyscope.activations.shards.order import permutation
from everyscope.activations.shards.statistics import Sums
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.base.errors import NonFinite, ShapeMismatch


def put(folder, rows, expected):
    places = np.arange(len(rows))
    with new_activation_shard(folder / "shard_00000.safetensors", "mlp_out layer 1", expected, 3, "bfloat16", 8, {}) as writer:
        writer.put(rows, places, 40 + places, places)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), NonFinite, "mlp_out layer 1, block 41, position 1: NaN"),
        (torch.tensor([[0.0, 3.4e38, 0], [0, 0, 0]]), NonFinite, "block 40, position 0"),  # finite, but not in bfloat16
        (torch.zeros(2, 4), ShapeMismatch, r"mlp_out layer 1: rows of shape \(2, 4\), expected \(2, 3\)"),
        (torch.zeros(1, 3), AssertionError, "1 rows put, 2 expected"),
    ],
)
def test_an_error_leaves_no_file(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        put(tmp_path, rows, expected=2)
    assert not list(tmp_path.iterdir())


def test_the_sidecar_of_a_deleted_shard_commits_nothing(tmp_path):
    put(tmp_path, torch.zeros(2, 3), expected=2)
    (tmp_path / "shard_00000.safetensors").unlink()
    with pytest.raises(NonFinite):
        put(tmp_path, torch.full((2, 3), torch.inf), expected=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("segment_rows", [1, 7, 100, 150, 151, 1000])
def test_a_shard_is_the_same_in_segments_of_any_size(tmp_path, dtype, segment_rows):
    random = np.random.default_rng(0)
    rows, places = torch.from_numpy(random.normal(size=(151, 6)).astype(np.float32)), permutation(151, 0)
    for name, size in (("whole", None), ("cut", segment_rows)):
        path = tmp_path / name / "shard_00000.safetensors"
        with new_activation_shard(path, "embed", 151, 6, dtype, 8, {"rows": 151}, size) as writer:
            for part in np.array_split(np.arange(151), 4):
                writer.put(rows[part], places[part], part, part % 8)
    for name in ("shard_00000.safetensors", "shard_00000.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_memory_is_a_segment_and_its_copy_whatever_the_shard(tmp_path):
    rows, d_in, segment = 2**15, 64, 2**10
    batch, places = torch.zeros(2**11, d_in), permutation(rows, 0).astype(np.int32)
    path = tmp_path / "shard_00000.safetensors"
    tracemalloc.start()
    try:
        with new_activation_shard(path, "embed", rows, d_in, "float32", 8, {}, segment) as writer:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for start in range(0, rows, len(batch)):
                where = np.arange(len(batch))
                writer.put(batch, places[start : start + len(batch)], where, where % 8)
            writer.finish()
            peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert rows * d_in * 4 == 8 << 20
    assert peak < 2 * segment * d_in * 4 + 24 * rows + (1 << 18)  # the last for a batch's own indices


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["float32", "bfloat16", "float64", "float16"])
@pytest.mark.parametrize("is_some", [True, False])
def test_the_kernels_store_and_sum_what_torch_and_numpy_do(tmp_path, model, stored, is_some):
    bits = np.random.default_rng(3).integers(0, 2**32, (500, 9), dtype=np.uint32)
    bits[0, :6] = [0x00000001, 0x80000000, 0x3F808000, 0x3F818000, 0x3F80FFFF, 0x007FFFFF]  # subnormals, -0, ties both ways
    bits[~np.isfinite(bits.view(np.float32))] = 0x3F8ABCDE
    rows = torch.from_numpy(bits.view(np.float32)).clamp(-60000, 60000).to(getattr(torch, model))
    taken = np.random.default_rng(4).permutation(500)[:300] if is_some else None
    chosen = rows if taken is None else rows[torch.from_numpy(taken)]
    path = tmp_path / "shard_00000.safetensors"
    places, position = permutation(len(chosen), 1), np.arange(len(chosen)) % 8
    with new_activation_shard(path, "embed", len(chosen), 9, stored, 8, {}) as writer:
        writer.put(rows, places, places, position, taken)
    want = chosen.to(getattr(torch, stored))
    got = load_file(path)["activations"][torch.from_numpy(places)]
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    twin = Sums(9, 8)
    twin.add(want.float().numpy(), position)
    found = Sums.of_record(read_sidecar(path).statistics)
    np.testing.assert_array_equal(found.position_count, twin.position_count)
    # Sums of a few hundred float64 in another order; those of signed numbers may cancel, to a share of the largest.
    np.testing.assert_allclose(found.position_squared_norm, twin.position_squared_norm, rtol=1e-13)
    np.testing.assert_allclose(found.total, twin.total, rtol=1e-13, atol=1e-13 * 60000 * 500)


def test_not_a_number_is_never_rounded_to_a_number(tmp_path):
    rows = torch.from_numpy(np.array([[0xFFFFFFFF, 0, 0]], np.uint32).view(np.float32))
    with pytest.raises(NonFinite):
        put(tmp_path, rows, expected=1)


def test_places_out_of_bounds_are_noticed_before_anything_is_written(tmp_path):
    where = np.arange(2)
    for places, taken in ((where + 1, None), (where - 1, None), (where, where + 1), (where, where - 1)):
        with (
            pytest.raises(AssertionError, match="embed"),
            new_activation_shard(tmp_path / "shard_00000.safetensors", "embed", 2, 3, "float32", 8, {}) as writer,
        ):
            writer.put(torch.zeros(2, 3), places, where, where, taken)
