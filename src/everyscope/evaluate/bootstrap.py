"""Intervals by resampling documents: how far a number would move with other documents of the same kind.

Tokens of one document are not independent, so documents are drawn, with all that was summed in them, and each ratio is taken
of the resampled sums. Percentiles of the resampled values make the interval, at levels widened for few documents: with n of
them, the plain percentile interval is too short by sqrt((n - 1) / n) and by the normal's quantile where Student's is due
(Hesterberg's expanded percentile interval, arXiv 1411.5279). BCa corrects skewness and bias but not this shortness, which is
what matters for the dozens of documents of a small run, and it needs a jackknife for every number.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Statistic = Callable[[Float[Tensor, "resamples columns"]], Float[Tensor, " resamples"]]
"""A number made from sums, for many sums at once."""
QUANTILE_CELLS = 1 << 16
"""Cells of the grid on which Student's distribution is integrated."""


class Resampler:
    """The same drawings of documents for every number of an evaluation, so that numbers can be subtracted."""

    def __init__(self, num_units: int, resamples: int, level: float, seed: int) -> None:
        """Draw `num_units` documents, `resamples` times; `level` is the share of intervals that hold the truth [1]."""
        self.num_units, self.level = num_units, level
        drawn = np.random.default_rng(seed).multinomial(num_units, np.full(num_units, 1 / num_units), size=resamples)
        self._weights = torch.from_numpy(drawn).double()

    def sums(self, table: Float[Tensor, "units columns"]) -> Float[Tensor, "resamples columns"]:
        """What `table` sums to in each resample, float64."""
        return self._weights @ table.double().cpu()

    def interval(self, values: Float[Tensor, " resamples"]) -> list[float] | None:
        """[low, high] of a number that takes these values; None with fewer than two documents, or where a value is undefined."""
        if self.num_units < 2 or not torch.isfinite(values).all():
            return None
        tail = widened_tail((1 - self.level) / 2, self.num_units)
        low, high = torch.quantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return [low, high]


def bootstrap_interval(
    table: Float[Tensor, "units columns"], statistic: Statistic, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[float] | None:
    """The interval of `statistic` of the sum of `table` over its units (documents)."""
    resampler = Resampler(len(table), resamples, level, seed)
    return resampler.interval(statistic(resampler.sums(table)))


def widened_tail(tail: float, num_units: int) -> float:
    """The share to cut off at each end instead of `tail`, for `num_units` documents: Phi(-sqrt(n / (n - 1)) t) [1]."""
    student = student_quantile(1 - tail, num_units - 1)
    return NormalDist().cdf(-math.sqrt(num_units / (num_units - 1)) * student)


def student_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom.

    With t = sqrt(freedom) tan(angle), the angle has a density in proportion to cos^(freedom - 1), on an open interval.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, QUANTILE_CELLS + 1)
    middles = (angles[:-1] + angles[1:]) / 2
    below = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, below / below[-1], angles)))
