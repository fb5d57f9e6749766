"""How several processes share one training: a mesh of latent shards by data replicas, and what they do together.

Ranks are numbered with shards running fastest, so that those who exchange reconstructions at every step are neighbours on a host.
One process alone takes the same path as many, with nothing behind it: no group, no socket, no copy.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Axis = Literal["shards", "replicas", "all"]
"""Whom a sum runs over: the shards of one replica, the replicas of one shard, or every rank."""
AXES: tuple[Axis, ...] = ("shards", "replicas", "all")


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands."""

    shards: int = 1
    """Ranks that share the latents of one SAE."""
    replicas: int = 1
    """Ranks that hold the same latents and share the rows of a batch."""
    rank: int = 0

    def __post_init__(self) -> None:
        """A rank that is on the mesh."""
        assert 0 <= self.rank < self.ranks, f"rank={self.rank} of {self.shards} x {self.replicas}"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.shards * self.replicas

    @property
    def shard(self) -> int:
        """Which part of the latents is this rank's."""
        return self.rank % self.shards

    @property
    def replica(self) -> int:
        """Which part of the rows is this rank's."""
        return self.rank // self.shards

    def members(self, axis: Axis) -> range:
        """The ranks that this one sums with over `axis`, itself included."""
        if axis == "shards":
            return range(self.replica * self.shards, (self.replica + 1) * self.shards)
        return range(self.shard, self.ranks, self.shards) if axis == "replicas" else range(self.ranks)

    def latents(self, width: int) -> range:
        """The latents of an SAE that are this rank's."""
        return share(width, self.shards, self.shard)


class Collective(Protocol):
    """What ranks do together. Every rank must make the same calls in the same order."""

    @property
    def mesh(self) -> Mesh:
        """Where this rank stands."""
        ...

    def sum_(self, tensor: Tensor, axis: Axis) -> None:
        """Put the sum over `axis` into a contiguous `tensor`, in place; all who take part get the same bits."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...


class Alone:
    """One process: every sum is what it is already."""

    mesh = Mesh()

    def sum_(self, tensor: Tensor, axis: Axis) -> None:
        """Nothing."""

    def barrier(self) -> None:
        """Nothing."""


ALONE = Alone()


def share(count: int, parts: int, part: int) -> range:
    """Part number `part` of [0, count) in `parts` contiguous ones, whose sizes differ by one at most."""
    size, larger = divmod(count, parts)
    start = part * size + min(part, larger)
    return range(start, start + size + (part < larger))


def of_all(collective: Collective, value: Tensor) -> Tensor:
    """Every rank's number, by rank, where `value` [] is this one's; float64, exact, on the device of `value`."""
    values = torch.zeros(collective.mesh.ranks, dtype=torch.float64, device=value.device)
    values[collective.mesh.rank] = value
    collective.sum_(values, "all")
    return values
