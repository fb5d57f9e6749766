"""Ranks as threads of this process, one at a time: the mathematics of several ranks without processes and sockets."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from everyscope.sae.mesh import AXES, Axis, Collective, Mesh

WAIT_SECONDS = 60


class InThreads:
    """One rank of several that share memory."""

    def __init__(
        self,
        mesh: Mesh,
        tables: dict[tuple[Axis, int], list[torch.Tensor]],
        barriers: dict[Any, threading.Barrier],
        turn: threading.Lock,
    ) -> None:
        self.mesh, self._tables, self._barriers, self._turn = mesh, tables, barriers, turn
        self.bytes_reduced = dict.fromkeys(AXES, 0)

    def sum_(self, tensor: torch.Tensor, axis: Axis) -> None:
        assert tensor.is_contiguous()
        members = self.mesh.members(axis)
        key = (axis, members.start)
        self._tables[key][members.index(self.mesh.rank)] = tensor
        self._wait(key)
        total = torch.stack(self._tables[key]).sum(0) if len(members) > 1 else tensor.clone()
        self._wait(key)
        tensor.copy_(total)
        self.bytes_reduced[axis] += tensor.numel() * tensor.element_size() * (len(members) > 1)

    def barrier(self) -> None:
        self._wait(("all", 0))

    def _wait(self, key: tuple[Axis, int]) -> None:
        """Let the others work meanwhile: what they call, as Triton's interpreter, may not be for several threads at once."""
        self._turn.release()
        try:
            self._barriers[key].wait(WAIT_SECONDS)
        finally:
            self._turn.acquire()


def in_threads(work: Callable[[Collective], Any], shards: int, replicas: int) -> list[Any]:
    """What `work` returns at every rank, by rank."""
    meshes = [Mesh(shards, replicas, rank) for rank in range(shards * replicas)]
    keys = {(axis, mesh.members(axis).start): len(mesh.members(axis)) for mesh in meshes for axis in AXES}
    tables = {key: [torch.empty(0)] * size for key, size in keys.items()}
    barriers = {key: threading.Barrier(size) for key, size in keys.items()}

    def rank(mesh: Mesh) -> Any:
        with turn:
            torch.set_num_threads(1)
            try:
                return work(InThreads(mesh, tables, barriers, turn))
            except BaseException:
                for barrier in barriers.values():
                    barrier.abort()
                raise

    turn = threading.Lock()
    with ThreadPoolExecutor(len(meshes)) as pool:
        return list(pool.map(rank, meshes))


@pytest.fixture(name="in_threads")
def in_threads_fixture() -> Callable[..., list[Any]]:
    return in_threads
