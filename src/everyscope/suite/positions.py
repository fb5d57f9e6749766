"""From position to position: what an SAE's by_position says, over stretches that are wide enough to be read. Torch-free."""

from typing import Any

import numpy as np
from jaxtyping import Float

BINS = 14
"""Stretches of positions, of equal length in the logarithm where there are enough positions."""

Curve = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Token numbers and values."""


def stretches(tokens: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " m"]]:
    """Places in `tokens` (numbers from 1, rising), cut into stretches of about equal length in log; none is empty."""
    edges = np.unique(np.round(np.geomspace(tokens[0], tokens[-1] + 1, BINS + 1)))
    which = np.digitize(tokens, edges)
    return [np.flatnonzero(which == number) for number in np.unique(which)]


def relative_error(metrics: dict[str, Any]) -> Curve:
    """Mean squared error of each stretch over that of all positions [1]."""
    return _curve(_arrays(metrics, "error", "count"), metrics["mse"])


def position_fvu(metrics: dict[str, Any]) -> Curve:
    """Errors of each stretch over the sum of its positions' variances, each about its own mean [1]."""
    tokens, fvu, error, count = _arrays(metrics, "fvu", "error", "count")
    is_known = (fvu > 0) & (error > 0)
    tokens, fvu, error, count = (values[is_known] for values in (tokens, fvu, error, count))
    return _curve((tokens, fvu, error * count / fvu), 1.0)


def position_delta_loss(metrics: dict[str, Any]) -> Curve:
    """Delta loss of each stretch over the positions that count for it [nats/token]."""
    return _curve(_arrays(metrics, "delta_loss", "loss_count"), 1.0)


def _arrays(metrics: dict[str, Any], *names: str) -> tuple[Float[np.ndarray, " n"], ...]:
    """Token numbers and the columns `names` of by_position, without positions at which one of them is unknown."""
    found = metrics["by_position"]
    columns = [np.array([np.nan if value is None else value for value in found[name]], np.float64) for name in names]
    is_known = np.all(np.isfinite(columns), axis=0)
    tokens = np.array(found["position"], np.float64)[is_known] + 1
    return tokens, *(column[is_known] for column in columns)


def _curve(columns: tuple[Float[np.ndarray, " n"], ...], unit: float) -> Curve:
    """Weighted means over stretches; `columns` are token numbers, values and weights."""
    tokens, values, weights = columns
    has_weight = weights > 0
    tokens, values, weights = tokens[has_weight], values[has_weight], weights[has_weight]
    if not len(tokens) or not unit:
        return np.empty(0), np.empty(0)
    parts = stretches(tokens)
    means = [float((values[part] * weights[part]).sum() / weights[part].sum()) / unit for part in parts]
    return np.array([float(np.exp(np.log(tokens[part]).mean())) for part in parts]), np.array(means)
