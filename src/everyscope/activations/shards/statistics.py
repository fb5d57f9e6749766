"""What training and evaluation need to know of a site's activations, summed in float64 while the shards are written.

The sums are of the values as stored: those of a bfloat16 shard describe the rounded numbers that will be read. A shard keeps
its sums beside it, so that statistics of any number of shards come from merging and never from reading them again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int
from pydantic import Field, model_validator

from everyscope.activations.shards.norms import Norms, NormsRecord
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
    norms: NormsRecord
    """How the rows' norms are distributed."""

    @model_validator(mode="after")
    def _check(self) -> "SumsRecord":
        self.norms.check(len(self.total))
        return self


class Sums:
    """Running sums over rows; all other figures follow from them."""

    def __init__(self, d_in: int, context: int) -> None:
        """Zero rows of `d_in` numbers, from blocks of `context` positions."""
        self.total = np.zeros(d_in, np.float64)
        self.position_count = np.zeros(context, np.int64)
        self.position_squared_norm = np.zeros(context, np.float64)
        self.norms = Norms()

    def add(
        self,
        rows: Float[np.ndarray, "rows d_in"],
        positions: Int[np.ndarray, " rows"],
        sequences: Int[np.ndarray, " rows"] | None = None,
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Count `rows` in, with the position in its block, and the block, that each is from; 0, 1, ... are blocks by default.

        On NaN or infinity nothing is added: NonFinite, which calls the first such row `name(its index)`.
        """
        total, norms = np.zeros_like(self.total), np.empty(len(rows), np.float64)
        for start in range(0, len(rows), CHUNK_ROWS):
            wide = rows[start : start + CHUNK_ROWS].astype(np.float64)
            norms[start : start + CHUNK_ROWS] = np.einsum("ij,ij->i", wide, wide)
            total += wide.sum(0)
        self.count(total, norms, positions, np.arange(len(rows)) if sequences is None else sequences, rows.__getitem__, name)

    def count(
        self,
        total: Float64[np.ndarray, " d_in"],
        squared_norms: Float64[np.ndarray, " rows"],
        positions: Int[np.ndarray, " rows"],
        sequences: Int[np.ndarray, " rows"],
        read: Callable[[np.ndarray], np.ndarray],
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Count in rows of which the sum and the squared norms are known; `read` gives the few with the indices that it receives.

        NaN and infinity are refused as by `add`.
        """
        if not np.isfinite(squared_norms).all():
            row = int(np.argmin(np.isfinite(squared_norms)))
            raise NonFinite(f"{name(row)}: NaN or infinity, expected finite activations; run the model in float32")
        context = len(self.position_count)
        self.total += total
        self.position_squared_norm += np.bincount(positions, weights=squared_norms, minlength=context)
        self.position_count += np.bincount(positions, minlength=context)
        self.norms.add(squared_norms, sequences, positions, read)

    def merge(self, other: "Sums") -> None:
        """Count in all rows that `other` has counted."""
        self.total += other.total
        self.position_count += other.position_count
        self.position_squared_norm += other.position_squared_norm
        self.norms.merge(other.norms)

    def record(self) -> SumsRecord:
        """These sums for a sidecar."""
        return SumsRecord(
            total=tuple(self.total.tolist()),
            position_count=tuple(self.position_count.tolist()),
            position_squared_norm=tuple(self.position_squared_norm.tolist()),
            norms=self.norms.record(),
        )

    @classmethod
    def of_record(cls, record: SumsRecord) -> "Sums":
        """The sums that a sidecar holds."""
        sums = cls(len(record.total), len(record.position_count))
        sums.total += record.total
        sums.position_count += record.position_count
        sums.position_squared_norm += record.position_squared_norm
        sums.norms = Norms.of_record(record.norms, len(record.total))
        return sums

    def statistics(self) -> "Statistics":
        """The figures that follow, for at least one row."""
        count = int(self.position_count.sum())
        assert count > 0, "statistics of no rows"
        per_position = self.position_squared_norm / np.maximum(self.position_count, 1)
        squared = float(self.position_squared_norm.sum()) / count
        return Statistics(count, self.total / count, squared, self.position_count.copy(), per_position, self.norms)


class StatisticsRecord(Schema):
    """`Statistics` as JSON, in files and over a wire."""

    count: int = Field(gt=0)
    """Rows [rows]."""
    scale: float = Field(ge=0)
    """Root of the mean squared norm, for readers who have no Python."""
    mean_squared_norm: float = Field(ge=0)
    """Mean of the rows' squared L2 norms."""
    mean: tuple[float, ...]
    """Mean activation."""
    position_count: tuple[int, ...]
    """Rows at each position of a block [rows]."""
    position_mean_squared_norm: tuple[float, ...]
    """Mean squared norm at each position."""
    norms: NormsRecord
    """How the rows' norms are distributed."""

    @model_validator(mode="after")
    def _check(self) -> "StatisticsRecord":
        self.norms.check(len(self.mean))
        return self


@dataclass(frozen=True)
class Usual:
    """Figures of the rows that are not massive, in the activations' own units."""

    count: int
    """Rows [rows]."""
    mean: Float64[np.ndarray, " d_in"]
    """Mean activation."""
    mean_squared_norm: float
    """Mean of the rows' squared L2 norms."""
    norm_limit: float
    """The norm above which a row is massive; infinity where none is left out."""

    @property
    def scale(self) -> float:
        """Root of the mean squared norm."""
        return math.sqrt(self.mean_squared_norm)

    @property
    def spread(self) -> float:
        """Root of the mean squared distance from the mean; 0 where all rows are equal."""
        return math.sqrt(max(0.0, self.mean_squared_norm - float(self.mean @ self.mean)))


@dataclass(frozen=True)
class Massive:
    """What was left out at a limit."""

    count: int
    """Rows above the limit [rows]."""
    share_of_rows: float
    """Their share of all rows [1]."""
    share_of_squares: float
    """Their share of the sum of squared norms [1]."""
    coordinates: tuple[tuple[int, float], ...]
    """The dimensions in which their mean is largest, and the share of their sum of squares that each holds at least [1]."""
    places: tuple[tuple[int, int], ...]
    """(block, position) of those of the largest norms."""


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
    norms: Norms
    """How the rows' norms are distributed."""

    @property
    def scale(self) -> float:
        """Root of the mean squared norm: dividing by it gives rows of mean squared norm 1 (Gemma Scope, section 3.1)."""
        return math.sqrt(self.mean_squared_norm)

    def norm_limit(self, max_norm: float | None) -> float:
        """The norm above which rows are massive, for a limit of `max_norm` times the median norm; infinity for None."""
        return self.norms.limit(max_norm)

    def usual(self, max_norm: float | None) -> Usual:
        """The figures of the rows that are not massive; `max_norm` [median norms] is at least TAIL, or None to keep all."""
        limit = self.norm_limit(max_norm)
        count, squares, total = self.norms.above(limit)
        if not count:
            return Usual(self.count, self.mean, self.mean_squared_norm, limit)
        left = self.count - count
        mean = (self.mean * self.count - total) / left
        return Usual(left, mean, (self.mean_squared_norm * self.count - squares) / left, limit)

    def massive(self, max_norm: float | None) -> Massive | None:
        """What is left out for `max_norm`; None where that is nothing."""
        limit = self.norm_limit(max_norm)
        count, squares, total = self.norms.above(limit)
        if not count:
            return None
        shares = np.square(total) / (count * squares)  # by Jensen's inequality the least that a coordinate can hold
        top = np.argsort(-shares, kind="stable")[:3]
        return Massive(
            count=count,
            share_of_rows=count / self.count,
            share_of_squares=squares / (self.mean_squared_norm * self.count),
            coordinates=tuple((int(dimension), float(shares[dimension])) for dimension in top if shares[dimension] >= 0.05),
            places=tuple((block, position) for square, block, position in self.norms.largest if square >= limit**2),
        )

    @classmethod
    def of_record(cls, record: StatisticsRecord) -> "Statistics":
        """The figures that `record` gave."""
        return cls(
            count=record.count,
            mean=np.array(record.mean, np.float64),
            mean_squared_norm=record.mean_squared_norm,
            position_count=np.array(record.position_count, np.int64),
            position_mean_squared_norm=np.array(record.position_mean_squared_norm, np.float64),
            norms=Norms.of_record(record.norms, len(record.mean)),
        )

    def record(self) -> StatisticsRecord:
        """The figures for a file or a wire."""
        return StatisticsRecord(
            count=self.count,
            scale=self.scale,
            mean_squared_norm=self.mean_squared_norm,
            mean=tuple(self.mean.tolist()),
            position_count=tuple(self.position_count.tolist()),
            position_mean_squared_norm=tuple(self.position_mean_squared_norm.tolist()),
            norms=self.norms.record(),
        )
