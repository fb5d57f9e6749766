"""Visits to places in a running model: plain PyTorch hooks that are always taken off again.

Blocks and attention modules return tuples in transformers 4 and mostly tensors in 5; a visitor sees the tensor in both.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from everyscope.sites.registry import HookPoint

Visitor = Callable[[Tensor], Tensor | None]
"""Takes the activations at a place [batch ctx d_in]; what it returns, unless None, takes their place."""


@contextmanager
def visiting(visits: Iterable[tuple[HookPoint, Visitor]]) -> Iterator[None]:
    """Let each visitor see its place in every forward pass inside the block. At one place, visitors come in order of entry."""
    with ExitStack() as stack:
        for place, visitor in visits:
            stack.callback(_attach(place, visitor).remove)
        yield


def _attach(place: HookPoint, visitor: Visitor) -> RemovableHandle:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            replaced = visitor(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        replaced = visitor(kwargs["hidden_states"])
        return None if replaced is None else (args, {**kwargs, "hidden_states": replaced})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return visitor(output)
        replaced = visitor(output[0])
        return None if replaced is None else (replaced, *output[1:])

    if place.side == "input":
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)
