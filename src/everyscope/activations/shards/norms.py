"""How the norms of a site's rows are distributed, and which rows are massive.

Language models have *massive* rows: a few tokens (attention sinks, separators) whose norm is ten to a thousand times the median
and which hold most of a site's sum of squares (Sun et al., arXiv 2402.17762). Scaling by the root mean square, or reporting the
variance explained, then measures those few alone. So norms are counted in a histogram of quarter octaves, and its upper bins
keep the sums of their rows: figures of the *usual* rows follow for any limit without reading a row again. Torch-free.
"""

import base64
import heapq
import math
from collections.abc import Callable, Iterable
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Int
from pydantic import AfterValidator

from everyscope.base.schema import Schema

MAX_NORM = 8.0
"""By default rows above this many times their site's median norm are massive and left out; docs/concepts/rows.md [1]."""
BINS_PER_OCTAVE = 4
"""Bins of the norms' histogram while a norm doubles."""
MAX_BINS = 40
"""Bins with rows that are kept apart; lower norms are counted in the lowest of these."""
TAIL = 2.0
"""Rows above this many times the median norm have sums of their own, so a limit may not be lower [1]."""
TAIL_BINS = 12
"""The highest so many bins above TAIL keep the sum of their rows; a limit below them takes what lies between for usual."""
NUM_LARGEST = 16
"""Rows of the largest norms whose places are kept [rows]."""
COLUMNS = 3
"""Numbers that describe one bin, or one row."""


def bins_of(squared_norms: Float64[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """The bin of the norms' histogram that each row is in: b holds norms in [2^(b/4), 2^((b+1)/4)); zero rows are lowest."""
    exponents = np.log2(np.maximum(squared_norms, np.finfo(np.float64).tiny)) / 2
    return np.floor(exponents * BINS_PER_OCTAVE).astype(np.int64)


ZERO_BIN = int(bins_of(np.zeros(1))[0])
"""The bin of rows that are zero."""


def lower_edge(norm_bin: int) -> float:
    """The least norm in a bin."""
    return 2.0 ** (norm_bin / BINS_PER_OCTAVE)


def _is_base64_of_float64(value: str) -> str:
    if len(base64.b64decode(value, validate=True)) % 8:
        raise ValueError("expected float64 numbers in base64")
    return value


def record_bytes(d_in: int) -> int:
    """What a NormsRecord takes in a file at most [bytes]."""
    numbers = COLUMNS * (MAX_BINS + NUM_LARGEST) + TAIL_BINS * (1 + d_in)
    return 512 + 11 * numbers  # 8 bytes each, and a third more as text


def packed(table: Float64[np.ndarray, "rows columns"]) -> str:
    """A table as little-endian float64 in base64: to the bit, and a third of the size of JSON numbers."""
    return base64.b64encode(table.astype("<f8").tobytes()).decode()


def unpacked(text: str, columns: int) -> Float64[np.ndarray, "rows columns"]:
    """The table that `packed` gave."""
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64).reshape(-1, columns)


def _is_packed(text: str) -> str:
    data = base64.b64decode(text, validate=True)
    if len(data) % 8 or not np.isfinite(np.frombuffer(data, "<f8")).all():
        raise ValueError("expected finite float64 numbers in base64")
    return text


Packed = Annotated[str, AfterValidator(_is_packed)]


class NormsRecord(Schema):
    """How norms are distributed; tables as `packed` writes them."""

    bins: Packed
    """(bin, rows, sum of squared norms) for each bin with rows, ascending."""
    tail: Packed
    """(bin, sum of its rows [d_in]) for upper bins, ascending."""
    largest: Packed
    """(squared norm, block, position) of the rows of the largest norms, falling."""

    def check(self, d_in: int) -> None:
        """ValueError where the tables are not of activations of this size."""
        for name, columns in (("bins", COLUMNS), ("tail", 1 + d_in), ("largest", COLUMNS)):
            if len(base64.b64decode(getattr(self, name))) % (8 * columns):
                raise ValueError(f"norms.{name} is no table of {columns} columns")


class Norms:
    """How the norms of a site's rows are distributed, and where the largest are."""

    def __init__(self) -> None:
        """Those of no rows."""
        self.bins: dict[int, tuple[int, float]] = {}
        self.tail: dict[int, np.ndarray] = {}
        self.largest: list[tuple[float, int, int]] = []

    @classmethod
    def of_record(cls, record: NormsRecord, d_in: int) -> "Norms":
        """Those that a sidecar holds."""
        norms = cls()
        norms.bins = {int(number): (int(rows), squares) for number, rows, squares in unpacked(record.bins, COLUMNS).tolist()}
        norms.tail = {int(row[0]): row[1:] for row in unpacked(record.tail, 1 + d_in)}
        norms.largest = [(square, int(block), int(at)) for square, block, at in unpacked(record.largest, COLUMNS).tolist()]
        return norms

    def record(self) -> NormsRecord:
        """These for a sidecar."""
        tail = [np.concatenate([[number], self.tail[number]]) for number in sorted(self.tail)]
        return NormsRecord(
            bins=packed(np.array([(number, *self.bins[number]) for number in sorted(self.bins)], np.float64)),
            tail=packed(np.array(tail, np.float64)),
            largest=packed(np.array(self.largest, np.float64)),
        )

    def add(
        self,
        squared_norms: Float64[np.ndarray, " rows"],
        sequences: Int[np.ndarray, " rows"],
        positions: Int[np.ndarray, " rows"],
        read: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Count rows in; `read` gives those with the indices that it is given, [n, d_in]."""
        if not len(squared_norms):
            return
        bins = bins_of(squared_norms)
        for number in np.unique(bins).tolist():
            chosen = squared_norms[bins == number]
            self._count(number, len(chosen), float(chosen.sum()))
        self._fold_low()
        tail = np.flatnonzero(bins >= self._bin_above(TAIL))
        if len(tail):
            rows = read(tail).astype(np.float64)
            for number in np.unique(bins[tail]).tolist():
                self._sum(number, rows[bins[tail] == number].sum(0))
            self._fold_tail()
        places = zip(squared_norms.tolist(), sequences.tolist(), positions.tolist(), strict=True)
        self._keep_largest(places)

    def merge(self, other: "Norms") -> None:
        """Count in all rows that `other` has counted."""
        for number, (rows, squares) in other.bins.items():
            self._count(number, rows, squares)
        for number, total in other.tail.items():
            self._sum(number, total)
        self._fold_low()
        self._fold_tail()
        self._keep_largest(iter(other.largest))

    def limit(self, max_norm: float | None) -> float:
        """The norm above which rows are massive: the lower edge of the bin that `max_norm` times the median falls in, or next to.

        The median is the middle of its bin, so the limit is within a fifth of what was asked for; infinity for None.
        """
        if max_norm is None or not self.bins or self._median_bin() == ZERO_BIN:
            return math.inf
        return lower_edge(self._bin_above(max_norm))

    def median(self) -> float:
        """The median norm, to within half a bin; for at least one row."""
        return 2.0 ** ((self._median_bin() + 0.5) / BINS_PER_OCTAVE)

    def above(self, limit: float) -> tuple[int, float, Float64[np.ndarray, " d_in"]]:
        """Rows in the bins from norm `limit` on: how many, the sum of their squared norms, and their sum."""
        chosen = [number for number in self.bins if lower_edge(number) >= limit]
        total = sum((self.tail[number] for number in chosen if number in self.tail), np.zeros(1))
        return sum(self.bins[number][0] for number in chosen), sum(self.bins[number][1] for number in chosen), total

    def _bin_above(self, multiple: float) -> int:
        """The first bin whose rows count as above so many times the median norm."""
        return self._median_bin() + round(BINS_PER_OCTAVE * math.log2(multiple) + 0.5)

    def _median_bin(self) -> int:
        half, seen = sum(rows for rows, _ in self.bins.values()) / 2, 0
        for number in sorted(self.bins):
            seen += self.bins[number][0]
            if seen >= half:
                return number
        raise AssertionError("the median of no rows")

    def _count(self, number: int, rows: int, squares: float) -> None:
        before = self.bins.get(number, (0, 0.0))
        self.bins[number] = before[0] + rows, before[1] + squares

    def _sum(self, number: int, total: np.ndarray) -> None:
        self.tail[number] = self.tail[number] + total if number in self.tail else total

    def _fold_low(self) -> None:
        for number in sorted(self.bins)[:-MAX_BINS]:
            rows, squares = self.bins.pop(number)
            self._count(min(self.bins), rows, squares)

    def _fold_tail(self) -> None:
        for number in sorted(self.tail)[:-TAIL_BINS]:
            del self.tail[number]

    def _keep_largest(self, places: Iterable[tuple[float, int, int]]) -> None:
        self.largest = heapq.nsmallest(NUM_LARGEST, [*self.largest, *places], key=lambda row: (-row[0], row[1], row[2]))
