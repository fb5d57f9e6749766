import os

import numpy as np
import pytest

from everyscope.activations.shards.cache import BlockCache, default_cache_folder


def put_many(cache: BlockCache, count: int, size: int) -> None:
    for number in range(count):
        cache.put(f"{number:064x}-0", bytes([number % 256]) * size)


def kept(folder) -> list[int]:
    return sorted(int(path.name[:64], 16) for path in folder.glob("??/*"))


def test_it_never_takes_more_room_than_it_may(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=10_000)
    for number in range(100):
        cache.put(f"{number:064x}-0", bytes(700))
        assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 10_000
    assert len(kept(tmp_path)) >= 12


def test_what_was_used_last_stays(tmp_path):
    put_many(BlockCache(tmp_path, 2000), 20, 100)
    for number, path in enumerate(sorted(tmp_path.glob("??/*"))):
        os.utime(path, (number, number))
    cache = BlockCache(tmp_path, 2000)
    assert cache.get(f"{3:064x}-0", lambda data: True) is not None
    cache.put(f"{99:064x}-0", bytes(100))
    left = set(kept(tmp_path))
    assert {3, 99} <= left
    others = left - {3, 99}
    assert others == set(range(min(others), 20)) - {3}


def test_a_wrong_block_is_deleted_and_not_given(tmp_path):
    cache = BlockCache(tmp_path)
    cache.put("ab-0", b"right")
    path = next(tmp_path.glob("??/*"))
    path.write_bytes(b"wrong")
    assert cache.get("ab-0", lambda data: bytes(data) == b"right") is None
    assert not path.exists()
    assert cache.get("cd-0", lambda data: True) is None


def test_where_nothing_can_be_kept_nothing_is(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        cache = BlockCache(folder)
        cache.put("ab-0", b"data")
        assert cache.get("ab-0", lambda data: True) is None
    small = BlockCache(tmp_path / "small", max_bytes=3)
    small.put("ab-0", b"data")
    assert small.get("ab-0", lambda data: True) is None


def test_leftovers_of_killed_processes_go_first_or_last_but_go(tmp_path):
    (tmp_path / "ab").mkdir()
    left = tmp_path / "ab/abcd-0.123.456.partial"
    left.write_bytes(bytes(900))
    os.utime(left, (0, 0))
    BlockCache(tmp_path, 1000).put("ef-0", bytes(500))
    assert not left.exists()


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_a_clock_that_jumps_costs_blocks_but_no_bits(tmp_path, jump):
    cache = BlockCache(tmp_path, 1000)
    put_many(cache, 5, 150)
    for path in tmp_path.glob("??/*"):
        os.utime(path, (path.stat().st_mtime + jump,) * 2)
    put_many(cache, 9, 150)
    found = [cache.get(f"{number:064x}-0", lambda data: True) for number in range(9)]
    assert all(data is None or np.array_equal(data, np.full(150, number, np.uint8)) for number, data in enumerate(found))


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.delenv("EVERYSCOPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "everyscope"
    monkeypatch.setenv("EVERYSCOPE_CACHE", str(tmp_path / "mine"))
    assert default_cache_folder() == tmp_path / "mine"
