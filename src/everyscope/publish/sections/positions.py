"""From position to position: what the canonical SAEs reach early and late in a block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from everyscope.publish.drawing.palette import SITE_TITLES
from everyscope.publish.drawing.pictures import Panel, Picture
from everyscope.publish.drawing.scales import scale_log, scale_value
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import Section
from everyscope.sites.names import SiteKind
from everyscope.suite.records import SaeRecord

BINS = 14
"""Stretches of positions, of equal length in the logarithm where there are enough positions."""

Curve = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Token numbers and values."""


def positions_section(evidence: Evidence) -> Section | None:
    """Error, FVU and delta loss by position; none where blocks are too short to show any."""
    if all(len(evidence.metrics[sae.folder]["by_position"]["position"]) < 2 for sae in evidence.chosen):
        return None
    pictures = (
        _picture(evidence, "error_by_position", "Squared error by position", "Squared error / its mean [1]", relative_error),
        _picture(evidence, "fvu_by_position", "FVU by position", "FVU at the position [1]", position_fvu),
        _picture(evidence, "delta_loss_by_position", "Delta loss by position", "Delta loss [nats/token]", position_delta_loss),
    )
    return Section(
        anchor="positions",
        title="From position to position",
        basis=evidence.basis,
        says=_says(evidence),
        notes=(
            "The canonical SAE of each site’s narrowest width. Token 1 is the block’s first; each point stands for a stretch "
            "of positions. Squared errors are divided by their mean over all positions; the FVU of a position has that "
            "position’s own variance below it.",
        ),
        pictures=pictures,
    )


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


def _picture(evidence: Evidence, file: str, title: str, label: str, of: Callable[[dict[str, Any]], Curve]) -> Picture:
    curves: dict[tuple[SiteKind, int], Curve] = {
        (sae.site, sae.layer): of(evidence.metrics[sae.folder]) for sae in evidence.chosen
    }
    panels = [
        Panel(
            SITE_TITLES[kind],
            partial(_draw, evidence=evidence, kind=kind, curves=curves, label=label),
        )
        for kind in evidence.kinds
    ]
    return Picture(file, title, tuple(panels), tuple(evidence.layer_keys))


def _draw(axes: Axes, *, evidence: Evidence, kind: SiteKind, curves: dict[tuple[SiteKind, int], Curve], label: str) -> None:
    for (where, layer), (tokens, values) in curves.items():
        if where == kind:
            axes.plot(tokens, values, color=evidence.layers[layer], marker="o", markersize=3)
    scale_log(axes.xaxis, [float(token) for tokens, _ in curves.values() for token in tokens], 1.15)
    here = [float(value) for (where, _), (_, values) in curves.items() if where == kind for value in values]
    scale_value(axes, here, is_logarithmic=False)
    axes.set_xlabel("Token of the block [tokens]")
    axes.set_ylabel(label)


def _says(evidence: Evidence) -> str:
    """Where errors are small, in numbers."""

    def first_of(sae: SaeRecord) -> float:
        _, values = relative_error(evidence.metrics[sae.folder])
        return float(values[0]) if len(values) else 1.0

    firsts = [first_of(sae) for sae in evidence.chosen]
    below = sum(first < 1 for first in firsts)
    low, high = min(firsts), max(firsts)
    return (
        f"At {below} of {len(firsts)} sites the first tokens of a block are reconstructed with less error than the rest: "
        f"theirs is {low:.2f} to {high:.2f} of the mean."
    )
