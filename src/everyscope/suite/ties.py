"""Ranks that say no more than the intervals allow. Torch-free.

Overlapping is not transitive: the first may tie with the second and the second with the third though the first beats the
third. So ties are no groups; each estimate has the span of places that it can still claim.
"""

from collections.abc import Sequence

Estimate = tuple[float, float, float]
"""A value and the two ends of its interval."""


def estimate(value: float, interval: tuple[float, float] | None) -> Estimate:
    """`value` with its interval; without one it is taken as exact."""
    return (value, value, value) if interval is None else (value, *interval)


def is_tie(one: Estimate, other: Estimate) -> bool:
    """True where the intervals overlap, or touch."""
    return one[1] <= other[2] and other[1] <= one[2]


def rank_spans(estimates: Sequence[Estimate], is_more_better: bool = False) -> list[tuple[int, int]]:
    """The best and the worst place of each estimate, from 1: behind all surely better ones, before all surely worse ones.

    Intervals of SAEs that were measured on the same documents move together, so some ties would fall in a paired comparison;
    no span is too narrow for that.
    """
    sign = -1 if is_more_better else 1
    ends = [sorted((sign * low, sign * high)) for _, low, high in estimates]
    best = [1 + sum(other[1] < one[0] for other in ends) for one in ends]
    worst = [len(ends) - sum(other[0] > one[1] for other in ends) for one in ends]
    return list(zip(best, worst, strict=True))
