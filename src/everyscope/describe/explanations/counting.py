"""Counting the values of some tokens over all families, compiled by numba: the search for rules does little else.

The counters are as long as there are values, of which a latent's firings have few; so they are kept between calls, and what
was counted is taken back before the call returns.
"""

import numba
import numpy as np
from jaxtyping import Float, Int

compiled = numba.njit(nogil=True, cache=True)


class Counters:
    """Counters for values [tokens, families] that are numbered from 0 to `num_values` over all families."""

    def __init__(self, values: Int[np.ndarray, "tokens families"], num_values: int) -> None:
        """Nothing is counted yet."""
        self._values = np.ascontiguousarray(values, np.int32)
        self._counts, self._totals = np.zeros(num_values, np.int64), np.zeros(num_values, np.int64)
        self._recall = np.zeros(num_values)

    def count(
        self, rows: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """The values that these tokens have, in order; on how many of them each stands; and their summed weights."""
        values = np.sort(_count(self._values, rows, weights, self._counts, self._recall))
        counts, recall = self._counts[values], self._recall[values]
        self._counts[values], self._recall[values] = 0, 0.0
        return values, counts, recall

    def totals(self, rows: Int[np.ndarray, " n"], wanted: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """On how many of these tokens each wanted value stands."""
        _add(self._values, rows, self._totals, 1)
        found = self._totals[wanted]
        _add(self._values, rows, self._totals, -1)
        return found


@compiled
def _count(values: np.ndarray, rows: np.ndarray, weights: np.ndarray, counts: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Add the values of `rows` to the counters; gives the distinct ones, in order of first appearance."""
    distinct = np.empty(min(len(rows) * values.shape[1], len(counts)), np.int64)
    size = 0
    for number in range(len(rows)):
        weight = weights[number]
        for value in values[rows[number]]:
            if counts[value] == 0:
                distinct[size] = value
                size += 1
            counts[value] += 1
            recall[value] += weight
    return distinct[:size]


@compiled
def _add(values: np.ndarray, rows: np.ndarray, totals: np.ndarray, amount: int) -> None:
    for row in rows:
        for value in values[row]:
            totals[value] += amount
