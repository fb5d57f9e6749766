"""Memory for batches: given out again once nobody holds it, and never before."""

import gc

import torch

from everyscope.stream.recycled import RecycledMemory


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_that_nobody_holds_is_given_out_again() -> None:
    memory = RecycledMemory()
    first = memory.empty(8, 4)
    where = address(first)
    del first
    gc.collect()
    assert address(memory.empty(8, 4)) == where


def test_memory_that_a_view_or_an_array_still_holds_is_left_alone() -> None:
    memory = RecycledMemory()
    first = memory.empty(8, 4).fill_(1)
    row, array = first[3], memory.empty(8, 4).fill_(2).numpy()[5]
    del first
    gc.collect()
    others = [memory.empty(8, 4).fill_(7) for _ in range(3)]
    assert row.tolist() == [1] * 4
    assert array.tolist() == [2] * 4
    assert len({address(other) for other in others}) == 3


def test_another_shape_has_memory_of_its_own() -> None:
    memory = RecycledMemory()
    held = memory.empty(8, 4).fill_(3)
    other = memory.empty(16, 2).fill_(5)
    assert other.shape == (16, 2)
    assert held.eq(3).all()
