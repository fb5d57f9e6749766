"""Triton, where it is installed. Kernels are defined on every machine, so that their modules load, and run where Triton is.

Triton comes with CUDA builds of torch. With TRITON_INTERPRET=1, set before this module loads, kernels run on the CPU, slowly.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from everyscope.base.errors import MissingExtra

triton: Any = import_module("triton") if find_spec("triton") else None
tl: Any = import_module("triton.language") if triton else None
constexpr: Any = tl.constexpr if triton else int
"""Marks a kernel's parameter as known when it is compiled."""


class _Missing:
    """Stands for a kernel where Triton is missing."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise MissingExtra("triton", "gpu", "training on pairs with a GPU")


def jit(kernel: Callable[..., Any]) -> Any:
    """`kernel` compiled by Triton; `step`, which is another number each time, does not ask for another compilation."""
    return triton.jit(do_not_specialize=["step"])(kernel) if triton else _Missing()


def tile_of(d_in: int) -> int:
    """How many columns a program takes at once: the largest power of two up to 512 that divides d_in, but at least 128.

    2304 and 3584 are nine times 256 and seven times 512: nothing is padded, and no row needs to fit into registers.
    """
    return max(128, min(512, d_in & -d_in))


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)
