import itertools
import shutil

import pytest

from everyscope.activations.harvest.folder import HarvestFolder
from everyscope.activations.harvest.locks import gate, partitions_at_work
from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import ConfigError, DataError, StorageError
from tests.unit.activations.harvest.conftest import tree

NUM_BUCKETS = 4


@pytest.fixture
def want(config, reap) -> dict[str, bytes]:
    """What one process writes."""
    reap(config, out=config.out.parent / "one")
    want = tree(config.out.parent / "one")
    assert f"tokens/shard_{NUM_BUCKETS - 1:05d}.json" in want
    return want


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("is_backwards", [False, True])
def test_partitions_merge_to_what_one_process_writes(config, reap, want, count, is_backwards):
    indices = range(count)[::-1] if is_backwards else range(count)
    results = [reap(config, partition=(index, count)) for index in indices]
    # More partitions than buckets: then the last ones have nothing to do, and the folder is sealed before their turn.
    assert [result.is_sealed for result in results][-1]
    assert not any(result.is_sealed for result in results[: min(count, NUM_BUCKETS) - 1])
    assert tree(config.out) == want
    assert {result.num_rows for result in results} == {reap(config).num_rows}
    assert {result.tokens_seen for result in results} == {reap(config).tokens_seen}


def test_each_bucket_is_written_by_its_partition_alone(config, reap, want):
    reap(config, partition=(1, 3))
    assert {name for name in tree(config.out) if "/shard" in name} == {
        name for name in want if "/shard_00001" in name or "/shard_00004" in name
    }
    with pytest.raises(DataError, match="no such file"):
        Shards(config.out / "attn_out/layer_0")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_partitions_may_come_in_any_order_and_stop_anywhere(config, reap, model, want, order):
    def unlucky(sites, input_ids):
        if model.passes % 11 == 10:
            model.passes += 1
            raise KeyboardInterrupt
        return model.activations(sites, input_ids)

    model.capture = unlucky
    for index in order:
        while True:
            try:
                reap(config, partition=(index, 3))
                break
            except KeyboardInterrupt:
                continue
    assert tree(config.out) == want


def test_another_number_of_partitions_may_go_on(config, reap, want):
    reap(config, partition=(2, 3))
    reap(config, partition=(1, 2))
    assert reap(config).is_sealed
    assert tree(config.out) == want


def test_a_partition_of_which_all_is_there_loads_no_model(config, reap, model, want):
    reap(config, partition=(0, 2))
    loads = model.loads
    assert not reap(config, partition=(0, 2)).is_sealed
    assert model.loads == loads
    reap(config, partition=(1, 2))
    assert reap(config, partition=(0, 2)).is_sealed
    assert tree(config.out) == want


def test_what_is_deleted_is_written_by_its_partition(config, reap, want):
    for index in range(2):
        reap(config, partition=(index, 2))
    (config.out / "resid_post/layer_1/shard_00001.safetensors").unlink()
    assert not reap(config, partition=(0, 2)).is_sealed
    assert reap(config, partition=(1, 2)).is_sealed
    assert tree(config.out) == want


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ((0, 1), (0, 1), "another harvest is writing here; wait"),
        ((1, 3), (1, 3), "another harvest is writing partition 1 of 3 here; wait"),
        ((1, 3), (0, 2), "another harvest is writing here in 3 partitions, not 2; wait"),
        ((1, 3), (0, 1), "another harvest is writing here in 3 partitions, not 1; wait"),
    ],
)
def test_two_writers_of_the_same_are_one_too_many(config, reap, theirs, ours, message, want):
    other = HarvestFolder(config.model_copy(update={"partition": theirs}), {"model": "stand-in"})
    with other.locked(), pytest.raises(StorageError, match=message):
        reap(config, partition=ours)
    reap(config)
    assert tree(config.out) == want


def test_writers_with_other_aims_do_not_mix(config, reap, want):
    for changes in ({"seed": 3}, {"max_bytes": 10**6}, {"num_tokens": 5}):
        other = HarvestFolder(config.model_copy(update={"partition": (0, 2), **changes}), {"model": "stand-in"})
        with other.locked(), pytest.raises(StorageError, match="another harvest is writing here with another config"):
            reap(config, partition=(1, 2))
    reap(config, partition=(1, 2))
    with pytest.raises(ConfigError, match="seed is 0 there and 3 here"):
        reap(config, partition=(0, 2), seed=3)


def test_several_partitions_may_be_at_work_and_leave_no_lock(config, reap, want):
    with HarvestFolder(config.model_copy(update={"partition": (0, 3)}), {"model": "stand-in"}).locked():
        reap(config, partition=(1, 3))
        reap(config, partition=(2, 3))
        with gate(config.out):
            assert set(partitions_at_work(config.out)) == {(0, 3)}
    assert not list(config.out.glob("*.lock"))
    reap(config, partition=(0, 3))
    assert tree(config.out) == want


def test_locks_of_the_dead_hold_nobody_up(config, reap, want):
    config.out.mkdir()
    for name in ("gate.lock", "partition_0_of_1.lock", "partition_2_of_7.lock"):
        (config.out / name).write_text("left behind")
    reap(config)
    assert tree(config.out) == want
    (config.out / "partition_1_of_2.lock").write_text("left behind")
    reap(config)
    assert tree(config.out) == want


def test_half_written_files_of_others_are_left_alone(config, reap, want):
    shutil.copytree(config.out.parent / "one", config.out)
    for name in ("manifest.json", "shard_00001.json"):
        (config.out / "attn_out/layer_0" / name).unlink()
    partial = config.out / "attn_out/layer_0/shard_00001.safetensors.partial"
    partial.write_bytes(b"being written by partition 1")
    reap(config, partition=(0, 2))
    assert partial.exists()
    reap(config, partition=(1, 2))
    assert tree(config.out) == want
    verify_shards(config.out)
