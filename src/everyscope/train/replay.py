"""Whole steps recorded once and replayed: a GPU then starts some hundred kernels at one word of the host's.

What is recorded is a function of tensors alone. Numbers that change from step to step lie in the device's memory; what the host
decides, such as which SAE steps by pairs, is the key under which a recording is kept.
"""

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from everyscope.base.progress import say

Result = TypeVar("Result")
TRIES = 3
"""Steps of a key that run as they are before it is recorded: they compile kernels, and make their memory [steps]."""
MOST = 8
"""Recordings that are kept, each with memory of its own; keys beyond them run as they are."""


class Recorder(Protocol):
    """How a function of tensors is recorded."""

    def record(self, function: Callable[..., Result], *arguments: Tensor) -> tuple[Callable[[], None], Result]:
        """Record without running; what runs it again, always on the memory of `arguments`, and where its results will be."""
        ...


class CudaGraphs:
    """By CUDA graphs. Other threads may copy to the device meanwhile."""

    def record(self, function: Callable[..., Result], *arguments: Tensor) -> tuple[Callable[[], None], Result]:
        """Raises RuntimeError where something in `function` cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(*arguments)
        return graph.replay, result


class Replay:
    """Runs a function of tensors, from a recording where there is one."""

    def __init__(self, recorder: Recorder | None) -> None:
        """None never records."""
        self._recorder = recorder
        self._tries: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, tuple[tuple[Tensor, ...], Callable[[], None], object]] = {}

    def run(self, key: Hashable, function: Callable[..., Result], *arguments: Tensor) -> Result:
        """`function` of `arguments`. The result is good until the next call: a replay writes to the same memory.

        Functions of the same key must do the same, and arguments have the same shape. A function that cannot be recorded is run
        as it is, now and from now on.
        """
        key = (key, *((argument.shape, argument.dtype) for argument in arguments))
        if key not in self._recordings:
            self._tries[key] = self._tries.get(key, 0) + 1
            if self._recorder is None or self._tries[key] <= TRIES or len(self._recordings) == MOST:
                return function(*arguments)
            places = tuple(argument.clone() for argument in arguments)
            try:
                self._recordings[key] = (places, *self._recorder.record(function, *places))
            except RuntimeError as error:
                say(f"  steps are not replayed as CUDA graphs, which makes small SAEs slower: {error}")
                self._recorder = None
                return function(*arguments)
        places, again, result = self._recordings[key]
        for place, argument in zip(places, arguments, strict=True):
            place.copy_(argument)
        again()
        return result  # pyright: ignore[reportReturnType]  # functions of a key have results of one type
