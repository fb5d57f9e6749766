"""Threads of this process that compute side by side, each with torch's operations kept within its own thread.

`torch.set_num_threads` sets the calling thread's count and, besides, what every later thread of the process starts with. The
first is wanted here, the second would reach into the caller's program, so it is put back.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_SETTING = threading.Lock()
"""One pool at a time: another would take the count of 1 for the process's own and put that back."""


def single_threaded_pool(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, all started, in which torch uses one thread each; the process's other threads keep theirs."""
    pool, ready = ThreadPoolExecutor(count), threading.Barrier(count)

    def settle() -> int:
        own = torch.get_num_threads()  # asked first: a thread copies the process's count when first asked
        ready.wait()  # so that each thread settles, and none settles twice
        torch.set_num_threads(1)
        return own

    with _SETTING:
        before = [future.result() for future in [pool.submit(settle) for _ in range(count)]]
        restorer = threading.Thread(target=torch.set_num_threads, args=(before[0],))  # not here: it would set the caller's own
        restorer.start()
        restorer.join()
    return pool


class Threads:
    """Work spread over threads that leave one another's cores alone: torch's own products stay within their thread."""

    def __init__(self, count: int) -> None:
        """A pool of `count` threads; one is no pool at all."""
        self.count = count
        self._pool = single_threaded_pool(count) if count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results of `work`, in the order of `items`."""
        return list(self._pool.map(work, items) if self._pool else map(work, items))
