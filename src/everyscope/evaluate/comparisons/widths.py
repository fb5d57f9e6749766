"""What a wider SAE gains at the same sparsity: each width's curve over L0, read off at L0s that all widths reach."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from everyscope.base.ids import content_id
from everyscope.evaluate.comparisons.config import WidthsConfig
from everyscope.evaluate.comparisons.scored import Scored, read_scored
from everyscope.evaluate.comparisons.slices import is_current, left_out, write_slice

SLICE = "widths.json"
VERSION = 2


def run(config: WidthsConfig) -> Path:
    """Write slices/widths.json and return its path; where no site has SAEs of two widths that compare, it is left out."""
    scored = read_scored(config.evaluate)
    path = config.slices / SLICE
    inputs = content_id([VERSION, config.l0s, config.num_l0s, [one.evidence for one in scored]])
    if not is_current(path, inputs):
        sites = sorted({one.site for one in scored})
        groups = [group for site in sites for group in _groups(config, [one for one in scored if one.site == site])]
        if not groups:
            return left_out(path, "no site has SAEs of two widths that meet at one L0; more L0s of each width would compare")
        write_slice(path, inputs, {"groups": groups})
    return path


def curve_at(l0: Float[np.ndarray, " n"], value: Float[np.ndarray, " n"], wanted: float) -> float | None:
    """The value at L0 `wanted` on the line through the points, straight in log L0; None beyond the lowest or highest.

    Points of equal L0 count as one, at their mean value. L0s are above 0.
    """
    places, which = np.unique(l0, return_inverse=True)
    means = np.bincount(which, weights=value) / np.bincount(which)
    if not places[0] <= wanted <= places[-1]:
        return None
    return float(np.interp(np.log(wanted), np.log(places), means))


def common_l0s(curves: Sequence[Float[np.ndarray, " n"]], num_l0s: int) -> list[float]:
    """`num_l0s` L0s within the range of every curve, even in their logarithm; the middle alone for one; none without overlap."""
    low, high = max(float(l0.min()) for l0 in curves), min(float(l0.max()) for l0 in curves)
    if low > high:
        return []
    if num_l0s == 1 or low == high:
        return [float(np.sqrt(low * high))]
    inner = np.exp(np.linspace(np.log(low), np.log(high), num_l0s)[1:-1])
    return [low, *inner.tolist(), high]


def _groups(config: WidthsConfig, saes: Sequence[Scored]) -> list[dict[str, Any]]:
    """The groups of one site's SAEs: at each L0, every width's point. None for fewer than two widths."""
    by_width: dict[int, list[Scored]] = {}
    for one in sorted((one for one in saes if one.l0 > 0), key=lambda one: (one.width, one.l0, one.name)):
        by_width.setdefault(one.width, []).append(one)
    if len(by_width) < 2:
        return []
    curves = [np.array([one.l0 for one in ones]) for ones in by_width.values()]
    l0s = common_l0s(curves, config.num_l0s) if config.l0s is None else config.l0s
    return [{"site": saes[0].site.folder, "l0": l0, "points": [_point(ones, l0) for ones in by_width.values()]} for l0 in l0s]


def _point(saes: Sequence[Scored], l0: float) -> dict[str, Any]:
    """One width at one L0: its curves there, and its SAE nearest to it."""
    nearest = min(saes, key=lambda one: (abs(np.log(one.l0 / l0)), one.name))
    places = np.array([one.l0 for one in saes])
    return {
        "width": nearest.width,
        "sae": nearest.name,
        "l0": nearest.l0,
        "fvu": nearest.fvu,
        "fvu_usual": nearest.fvu_usual,
        "delta_loss": nearest.delta_loss,
        "fvu_usual_at_l0": curve_at(places, np.array([one.fvu_usual for one in saes]), l0),
        "delta_loss_at_l0": curve_at(places, np.array([one.delta_loss for one in saes]), l0),
    }
