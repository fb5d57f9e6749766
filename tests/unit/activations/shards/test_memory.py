"""Recycled memory: given out again once nobody holds it, and never before."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from everyscope.activations.shards.memory import RecycledMemory


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_that_nobody_holds_is_given_out_again() -> None:
    memory = RecycledMemory()
    first = memory.take(4096)
    where = address(first)
    del first
    assert address(memory.take(4000)) == where


def test_memory_that_a_view_a_tensor_or_its_array_still_holds_is_left_alone() -> None:
    memory = RecycledMemory()

    def numbers(value: float) -> np.ndarray:
        array = memory.take(4096).view(np.float32).reshape(32, 32)
        array[:] = value
        return array

    row, tensor, array = numbers(1)[3][:7], torch.from_numpy(numbers(2))[5], torch.from_numpy(numbers(3)).numpy()[6]
    others = [numbers(7) for _ in range(4)]
    assert row.tolist() == [1] * 7
    assert tensor.tolist() == [2] * 32
    assert array.tolist() == [3] * 32
    assert len({address(other) for other in others}) == 4


def test_memory_that_is_too_small_or_far_too_large_is_not_given_out_and_not_kept() -> None:
    memory = RecycledMemory()
    small = memory.take(100)
    del small
    held = memory.take(4096)
    held[:] = 3
    assert len(memory.take(10_000)) == 10_000
    assert held.tolist() == [3] * 4096
    assert len(memory.take(0)) == 0


def test_threads_that_share_it_never_get_the_same_memory() -> None:
    memory = RecycledMemory()

    def use(name: int) -> bool:
        for _ in range(300):
            window = memory.take(1 << 16)
            window[:] = name
            if not (window == name).all():
                return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(use, range(6)))


def test_there_is_no_more_memory_than_was_held_at_once() -> None:
    memory, seen = RecycledMemory(), set()
    held = [memory.take(5000), memory.take(5000)]
    for turn in range(20):
        held[turn % 2] = np.empty(0, np.uint8)
        held[turn % 2] = memory.take(5000 - turn)
        seen.add(address(held[turn % 2]))
    assert len(seen) == 2
