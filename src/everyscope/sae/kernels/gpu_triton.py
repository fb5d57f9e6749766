"""Triton, where it is installed. Kernels are defined on every machine, so that their modules load, and run where Triton is.

Triton comes with CUDA builds of torch. With TRITON_INTERPRET=1, set before this module loads, kernels run on the CPU, slowly.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from everyscope.base.errors import MissingExtra

triton: Any = import_module("triton") if find_spec("triton") else None
tl: Any = import_module("triton.language") if triton else None
constexpr: Any = tl.constexpr if triton else int
"""Marks a kernel's parameter as known when it is compiled."""


IS_INTERPRETED: Any = constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter cuts bfloat16 numbers off, where a device rounds to the nearest."""


class _Missing:
    """Stands for a kernel where Triton is missing."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise MissingExtra("triton", "gpu", "training on pairs with a GPU")


def jit(kernel: Callable[..., Any]) -> Any:
    """`kernel` compiled by Triton; `step`, which is another number each time, does not ask for another compilation."""
    return triton.jit(do_not_specialize=["step"])(kernel) if triton else _Missing()


@jit
def to_bfloat16(value):
    """The nearest bfloat16 numbers, of two equally near ones the even one."""
    if IS_INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(tl.bfloat16)


def columns_of(d_in: int, num_bytes: int) -> tuple[int, int]:
    """How many columns, of numbers of so many bytes, a program takes at once, and its warps; the last block is masked.

    A thread loads 16 bytes at a time. Where a block's threads, side by side, just cover its columns, a sum over pairs stays
    within each thread. With fewer columns several threads share one, and every addition goes through shared memory: at
    d_in=2304 blocks of 256 columns under four warps decode 14 times slower than blocks of 1,024. Of 4, 2 and 1 warps it takes
    the most whose blocks are together at most a third wider than a row.
    """
    for warps in (4, 2, 1):
        columns = 32 * warps * (16 // num_bytes)
        if 3 * columns * blocks(d_in, columns) <= 4 * d_in:
            break
    return columns, warps


def dots_tile(d_in: int) -> int:
    """Columns that a program which multiplies rows pair by pair takes at once; sums come after the last of them."""
    return 256 if d_in > 128 else 128


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def row_of_threads(d_in: int) -> tuple[int, int, int]:
    """For a program that holds whole rows: their padded width, its warps, and the pairs that it takes at once.

    32 columns a thread and four pairs at once are what was fastest at d_in=2304 on an H200. Rows of more than 4,096 columns take
    16 warps, with two pairs at once: eight warps would spill thousands of bytes.
    """
    tile = max(128, 1 << (d_in - 1).bit_length())
    return (tile, max(1, tile // 1024), 4) if tile <= 4096 else (tile, 16, 2)
