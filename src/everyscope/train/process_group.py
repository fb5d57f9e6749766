"""Ranks as processes that sum tensors over torch.distributed: gloo for the CPU, NCCL between GPUs.

torch's own rendezvous listens on every interface and knows no password. Here ranks of one host meet through a file, and those
of several through a store whose socket we bind to a given address; gloo listens on that address too. Only numbers go over these
sockets: no collective of torch's that pickles objects is used.
"""

import os
import socket
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everyscope.base.errors import ConfigError, EveryscopeError, first_line
from everyscope.sae.mesh import AXES, Axis, Mesh

c10d: Any = import_module("torch.distributed")
"""Of some builds of torch it is an empty shell, which matters to nobody who needs one process."""
Store = Any
"""A torch.distributed.Store."""
WAIT_SECONDS = 1800.0
"""How long a rank waits for another before it gives up [s]; one that died is noticed at once, one that froze only so."""
LOOPBACK = "127.0.0.1"


class LostPeer(EveryscopeError):
    """Another rank has gone: what is under way cannot be finished; training can resume from the last checkpoint."""


class ProcessGroup:
    """The ranks of a mesh, one process each. Sums over an axis of one rank cost nothing."""

    def __init__(
        self,
        mesh: Mesh,
        store: Store,
        device: str = "cpu",
        address: str = LOOPBACK,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Meet the others at `store`; `address` is this host's, on which it listens. LostPeer where they do not come."""
        self.mesh, self.bytes_reduced = mesh, dict.fromkeys(AXES, 0)
        """By axis, the sizes of the tensors that this rank has had summed [bytes]."""
        if not c10d.is_available():
            raise ConfigError(
                f"{mesh.ranks} processes for one training group need torch.distributed, which this torch was built without"
            )
        store.set_timeout(timedelta(seconds=wait_seconds))
        with _peers(mesh):
            self._on_cpu = {axis: _gloo(mesh, axis, store, address, wait_seconds) for axis in AXES}
            is_cuda = torch.device(device).type == "cuda"
            self._on_cuda = {axis: _nccl(mesh, axis, store, address, wait_seconds) for axis in AXES} if is_cuda else {}

    def sum_(self, tensor: Tensor, axis: Axis) -> None:
        """Put the sum over `axis` into `tensor`. On a GPU only its stream waits for it, not the host. LostPeer."""
        assert tensor.is_contiguous(), f"strides {tensor.stride()}"
        if len(self.mesh.members(axis)) == 1:
            return
        group = (self._on_cuda if tensor.is_cuda else self._on_cpu)[axis]
        with _peers(self.mesh):
            group.allreduce([tensor]).wait()
        self.bytes_reduced[axis] += tensor.numel() * tensor.element_size()

    def barrier(self) -> None:
        """Wait until every rank is here. LostPeer."""
        if self.mesh.ranks > 1:
            with _peers(self.mesh):
                self._on_cpu["all"].allreduce([torch.zeros(1)]).wait()


class _peers:  # noqa: N801
    """Within the block, torch's complaint that a rank is missing is a LostPeer."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise LostPeer(
                f"rank {self._mesh.rank} of {self._mesh.ranks} has lost another one ({first_line(error)}); "
                "run the same command to resume from the last checkpoint"
            ) from error


def _gloo(mesh: Mesh, axis: Axis, store: Store, address: str, wait_seconds: float) -> Any:
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=wait_seconds)
    return c10d.ProcessGroupGloo(*_place(mesh, axis, store, "gloo"), options)


def _nccl(mesh: Mesh, axis: Axis, store: Store, address: str, wait_seconds: float) -> Any:
    if not c10d.is_nccl_available():
        raise ConfigError("SAEs shared by GPUs need NCCL, which this torch was built without; install torch's CUDA build")
    if address == LOOPBACK:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # NCCL takes the name of an interface, not an address
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=wait_seconds)
    return c10d.ProcessGroupNCCL(*_place(mesh, axis, store, "nccl"), options)


def _place(mesh: Mesh, axis: Axis, store: Store, kind: str) -> tuple[Store, int, int]:
    """Among the ranks that sum over `axis` with this one: their own corner of the store, which one it is, their number."""
    members = mesh.members(axis)
    corner = c10d.PrefixStore(f"{kind}/{axis}/{members.start}", store)
    return corner, members.index(mesh.rank), len(members)


def file_store(path: Path, ranks: int) -> Store:
    """Where ranks of one host meet: a file that does not exist yet, in a folder that only its owner may enter."""
    return c10d.FileStore(str(path), ranks)


def socket_store(address: str, port: int, rank: int, ranks: int, wait_seconds: float = WAIT_SECONDS) -> Store:
    """Where ranks of several hosts meet: a store at address:port, which rank 0 opens and binds to that address alone.

    It has no password, so the network must be private. ConfigError where rank 0 cannot listen there.
    """
    listening = _listening(address, port) if rank == 0 else None
    return c10d.TCPStore(
        address,
        port if listening is None else listening.getsockname()[1],
        ranks,
        is_master=listening is not None,
        timeout=timedelta(seconds=wait_seconds),
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),  # from here on the store closes it
    )


def _listening(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), backlog=512)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}:{port} ({error.strerror}); give an address of this host and a free port"
        ) from error
