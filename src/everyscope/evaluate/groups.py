"""Sums by group: one mechanism for documents, positions and speakers.

Every row has an integer group along each axis; a table holds the sums of some columns for each group of an axis. So what is
true of the whole set can be asked of any part of it, and an interval is a ratio of sums over resampled documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.sae.metrics import centred_squares

Axis = str
"""document, position, segment or turn."""
Groups = Mapping[Axis, Int[Tensor, " rows"]]
"""The group of each row along each axis, int64."""


@dataclass
class Tables:
    """The sums of the same columns, by group, along several axes; float64."""

    axes: dict[Axis, Float[Tensor, "groups columns"]]

    @classmethod
    def start(cls, sizes: Mapping[Axis, int], columns: int, device: torch.device) -> Self:
        """Empty sums of `columns` columns for so many groups of each axis."""
        return cls({axis: torch.zeros(size, columns, dtype=torch.float64, device=device) for axis, size in sizes.items()})

    def add(self, groups: Groups, values: Float[Tensor, "rows columns"]) -> None:
        """Add each row to its groups; `groups` may name more axes than are kept here."""
        values = values.double()
        for axis, table in self.axes.items():
            if table.is_cuda:  # index_add_ adds in any order there, and a resumed evaluation must end with the same bits
                table.index_put_((groups[axis],), values, accumulate=True)
            else:
                table.index_add_(0, groups[axis], values)

    @property
    def total(self) -> Float[Tensor, " columns"]:
        """The sums over all rows, on the CPU; each row is in one document."""
        return self.axes["document"].sum(0).cpu()


def part(groups: Groups, rows: "slice | Bool[Tensor, ' all_rows']") -> Groups:
    """The groups of some of the rows."""
    return {axis: index[rows] for axis, index in groups.items()}


def moments(x: Float[Tensor, "rows d_in"], reference: Float[Tensor, " d_in"]) -> Float[Tensor, "rows columns"]:
    """The columns from which a group's variance follows: 1, ||x - r||^2 and x - r, float64."""
    shifted = x.double() - reference
    return torch.cat([torch.ones_like(shifted[:, :1]), shifted.square().sum(1, keepdim=True), shifted], dim=1)


def variance(sums: Float[Tensor, "*sets columns"]) -> Float[Tensor, "*sets"]:
    """Sum ||x - mean||^2 about each set's own mean, from the sums of `moments`."""
    return centred_squares(sums[..., 0], sums[..., 2:], sums[..., 1])
