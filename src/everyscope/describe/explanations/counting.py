"""Counting the values of some tokens over all families, compiled by numba: the search for rules does little else.

The counters are as long as there are values, of which a latent's firings have few; so they are kept between calls.
"""

import numba
import numpy as np
from jaxtyping import Float, Int

compiled = numba.njit(nogil=True, cache=True)


class ValueCounters:
    """Counters for values [tokens, families] that are numbered from 0 to `num_values` over all families."""

    def __init__(self, values: Int[np.ndarray, "tokens families"], num_values: int) -> None:
        """Nothing is counted yet."""
        self._values = np.ascontiguousarray(values, np.int32)
        self._counts, self._totals = np.zeros(num_values, np.int64), np.zeros(num_values, np.int32)
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
        self._totals.fill(0)
        _add(self._values, rows, self._totals)
        return self._totals[wanted].astype(np.int64)


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
def _add(values: np.ndarray, rows: np.ndarray, totals: np.ndarray) -> None:
    for row in rows:
        for value in values[row]:
            totals[value] += 1


@compiled
def choose_sets(
    values: np.ndarray,
    counts: np.ndarray,
    recall: np.ndarray,
    totals: np.ndarray,
    cost: float,
    least: int,
    offsets: np.ndarray,
    sizes: np.ndarray,
    price: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each family in which something gains: its number, and its values of largest gain, best first.

    `values` are numbered over all families as `offsets` say, in order; each gains recall - cost * false alarms, nothing where it
    has less than `least` firings. At most `sizes` values of a family are taken, after the first only those that gain more than
    `price`. Gives families [n], values [n, largest size], how many of these are used, their summed recall and false alarms.
    """  # fmt: skip
    families, places = np.empty(len(sizes), np.int64), np.full((len(sizes), sizes.max()), -1, np.int64)
    used = np.zeros(len(sizes), np.int64)
    gains = np.empty(len(values))
    for place in range(len(values)):
        gains[place] = recall[place] - cost * (totals[place] - counts[place]) if counts[place] >= least else -1.0
    num_sets, next_place = 0, 0
    for family in range(len(sizes)):
        while next_place < len(values) and values[next_place] < offsets[family + 1]:
            place, next_place = next_place, next_place + 1
            gain, size = gains[place], used[num_sets]
            if gain <= 0 or (size > 0 and gain <= price and gain <= gains[places[num_sets, 0]]):
                continue
            at = size
            while at > 0 and gains[places[num_sets, at - 1]] < gain:
                at -= 1
            if at >= sizes[family]:
                continue
            used[num_sets] = min(size + 1, sizes[family])
            for later in range(used[num_sets] - 1, at, -1):
                places[num_sets, later] = places[num_sets, later - 1]
            places[num_sets, at] = place
        size = used[num_sets]
        while size > 1 and gains[places[num_sets, size - 1]] <= price:  # the first, when a better one came
            size -= 1
        used[num_sets] = size
        if size:
            families[num_sets] = family
            num_sets += 1
    chosen, hits, missed = np.full((num_sets, places.shape[1]), -1, np.int64), np.zeros(num_sets), np.zeros(num_sets, np.int64)
    for number in range(num_sets):
        for rank in range(used[number]):
            place = places[number, rank]
            chosen[number, rank] = values[place]
            hits[number] += recall[place]
            missed[number] += totals[place] - counts[place]
    return families[:num_sets], chosen, used[:num_sets], hits, missed
