"""What training and evaluation need to know of a site's activations, summed in float64 while the shards are written.

The sums are of the values as stored: those of a bfloat16 shard describe the rounded numbers that will be read. A shard keeps
its sums beside it, so that statistics of any number of shards come from merging and never from reading them again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from everyscope.base.errors import NonFinite
from everyscope.base.schema import Schema

CHUNK_ROWS = 4096
"""Rows that are widened to float64 at a time, which bounds the memory of `Sums.add` [rows]."""


class SumsRecord(Schema):
    """`Sums` as JSON; floats print so that they read back to the same bits."""

    total: tuple[float, ...]
    """Sum of all rows, one number per dimension."""
    position_count: tuple[int, ...]
    """Rows at each position of a block [rows]."""
    position_squared_norm: tuple[float, ...]
    """Sum of squared L2 norms at each position of a block."""


class Sums:
    """Running sums over rows; all other figures follow from them."""

    def __init__(self, d_in: int, context: int) -> None:
        """Zero rows of `d_in` numbers, from blocks of `context` positions."""
        self.total = np.zeros(d_in, np.float64)
        self.position_count = np.zeros(context, np.int64)
        self.position_squared_norm = np.zeros(context, np.float64)

    def add(
        self,
        rows: Float[np.ndarray, "rows d_in"],
        positions: Int[np.ndarray, " rows"],
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Count `rows` in. On NaN or infinity nothing is added: NonFinite, which calls the first such row `name(its index)`."""
        total, norms = np.zeros_like(self.total), np.empty(len(rows), np.float64)
        for start in range(0, len(rows), CHUNK_ROWS):
            wide = rows[start : start + CHUNK_ROWS].astype(np.float64)
            norms[start : start + CHUNK_ROWS] = np.einsum("ij,ij->i", wide, wide)
            total += wide.sum(0)
        self.count(total, norms, positions, name)

    def count(
        self,
        total: Float64[np.ndarray, " d_in"],
        squared_norms: Float64[np.ndarray, " rows"],
        positions: Int[np.ndarray, " rows"],
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Count in rows of which the sum and the squared norms are known. NaN and infinity are refused as by `add`."""
        if not np.isfinite(squared_norms).all():
            row = int(np.argmin(np.isfinite(squared_norms)))
            raise NonFinite(f"{name(row)}: NaN or infinity, expected finite activations; run the model in float32")
        context = len(self.position_count)
        self.total += total
        self.position_squared_norm += np.bincount(positions, weights=squared_norms, minlength=context)
        self.position_count += np.bincount(positions, minlength=context)

    def merge(self, other: "Sums") -> None:
        """Count in all rows that `other` has counted."""
        self.total += other.total
        self.position_count += other.position_count
        self.position_squared_norm += other.position_squared_norm

    def record(self) -> SumsRecord:
        """These sums for a sidecar."""
        return SumsRecord(
            total=tuple(self.total.tolist()),
            position_count=tuple(self.position_count.tolist()),
            position_squared_norm=tuple(self.position_squared_norm.tolist()),
        )

    @classmethod
    def of_record(cls, record: SumsRecord) -> "Sums":
        """The sums that a sidecar holds."""
        sums = cls(len(record.total), len(record.position_count))
        sums.total += record.total
        sums.position_count += record.position_count
        sums.position_squared_norm += record.position_squared_norm
        return sums

    def statistics(self) -> "Statistics":
        """The figures that follow, for at least one row."""
        count = int(self.position_count.sum())
        assert count > 0, "statistics of no rows"
        per_position = self.position_squared_norm / np.maximum(self.position_count, 1)
        squared = float(self.position_squared_norm.sum()) / count
        return Statistics(count, self.total / count, squared, self.position_count.copy(), per_position)


@dataclass(frozen=True)
class Statistics:
    """Figures of one site over all its rows, in the activations' own units."""

    count: int
    """Rows [rows]."""
    mean: Float64[np.ndarray, " d_in"]
    """Mean activation."""
    mean_squared_norm: float
    """Mean of the rows' squared L2 norms."""
    position_count: Int[np.ndarray, " ctx"]
    """Rows at each position of a block [rows]."""
    position_mean_squared_norm: Float64[np.ndarray, " ctx"]
    """Mean squared norm at each position; 0 where there is no row, as at BOS."""

    @property
    def scale(self) -> float:
        """Root of the mean squared norm: dividing by it gives rows of mean squared norm 1 (Gemma Scope, section 3.1)."""
        return math.sqrt(self.mean_squared_norm)

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Statistics":
        """The figures that `as_json` gave."""
        return cls(
            count=value["count"],
            mean=np.array(value["mean"], np.float64),
            mean_squared_norm=value["mean_squared_norm"],
            position_count=np.array(value["position_count"], np.int64),
            position_mean_squared_norm=np.array(value["position_mean_squared_norm"], np.float64),
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; `scale` is there for readers who have no Python."""
        return {
            "count": self.count,
            "scale": self.scale,
            "mean_squared_norm": self.mean_squared_norm,
            "mean": self.mean.tolist(),
            "position_count": self.position_count.tolist(),
            "position_mean_squared_norm": self.position_mean_squared_norm.tolist(),
        }
