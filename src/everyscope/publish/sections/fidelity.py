"""Sparsity against fidelity: every SAE's delta loss and FVU at its L0, among what an SAE must beat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from everyscope.publish.drawing.palette import NEUTRAL
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.drawing.scales import LOWEST_L0, bars, scale_l0, scale_value
from everyscope.publish.evidence import Evidence, kind_of, layer_of
from everyscope.publish.sections.section import Section, middle_text, plural
from everyscope.sites.names import SITE_TITLES, SiteKind
from everyscope.suite.records import Interval, SaeRecord

BASELINES: dict[str, tuple[str, Any]] = {
    "pca": ("PCA, L0 components", (0, (5, 2))),
    "random_dictionary": ("random dictionary", (0, (1.2, 1.6))),
    "neuron_basis": ("largest neurons", (0, (5, 2, 1.2, 2))),
    "linear": ("linear map of the input", (0, (1, 3))),
    "random_model": ("SAE of a random model", "solid"),
}
"""Title and line style of each baseline."""
GRID = 24
"""Points of a baseline's line."""

Curve = list[tuple[float, float]]
"""Points of one layer's and width's baseline: L0 and value."""


@dataclass(frozen=True)
class FidelityMeasure:
    """A number drawn against L0."""

    file: str
    title: str
    label: str
    """Axis label, with unit."""
    of: Callable[[SaeRecord], float | None]
    interval: Callable[[SaeRecord], Interval | None]
    baseline: str | None
    """Its key among the baselines' numbers."""


FVU = FidelityMeasure(
    "fvu_against_l0",
    "Fraction of variance unexplained against L0",
    "FVU [1]",
    lambda sae: sae.metrics.fvu_usual,
    lambda sae: sae.metrics.intervals.fvu_usual,
    "fvu_usual",
)
DELTA_LOSS = FidelityMeasure(
    "delta_loss_against_l0",
    "Rise of the language model's loss against L0",
    "Delta loss [nats/token]",
    lambda sae: sae.metrics.delta_loss,
    lambda sae: sae.metrics.intervals.delta_loss,
    "delta_loss",
)


def fidelity_section(evidence: Evidence) -> Section:
    """The Pareto curves."""
    saes = evidence.index.saes
    wins = sum(sae.metrics.fvu_usual < sae.metrics.fvu_pca_usual for sae in saes)
    fvu = middle_text([sae.metrics.fvu_usual for sae in evidence.canonical])
    delta = middle_text([sae.metrics.delta_loss for sae in evidence.canonical])
    return Section(
        anchor="fidelity",
        title="Sparsity against fidelity",
        basis=evidence.basis,
        says=(
            f"PCA with as many components as the SAE has active latents is beaten by {wins} of {plural(len(saes), 'SAE')}; at "
            f"the canonical sparsity the FVU is {fvu}, and the loss rises by {delta} nats/token."
        ),
        notes=(
            "Down and to the left is better. Grey lines are baselines, the median of all layers, in a shade from the lowest "
            f"to the highest. A line that leaves the axis below goes to 0 or less. {evidence.interval_note}",
        ),
        pictures=(picture(evidence, DELTA_LOSS), picture(evidence, FVU)),
    )


def picture(evidence: Evidence, measure: FidelityMeasure) -> Picture:
    """One measure, a panel for each kind of site; all panels share their axes' ranges, so that they compare."""
    curves: dict[SiteKind, dict[str, list[Curve]]] = {kind: baseline_curves(evidence, measure, kind) for kind in evidence.kinds}
    shown = [name for name in BASELINES if any(curves[kind].get(name) for kind in evidence.kinds)]
    keys = [LegendKey(BASELINES[name][0], line=BASELINES[name][1]) for name in shown]
    panels = [
        Panel(SITE_TITLES[kind], partial(_draw, evidence=evidence, measure=measure, kind=kind, curves=curves))
        for kind in evidence.kinds
    ]
    return Picture(measure.file, measure.title, tuple(panels), (*evidence.layer_keys, *evidence.width_keys, *keys))


def baseline_curves(evidence: Evidence, measure: FidelityMeasure, kind: SiteKind) -> dict[str, list[Curve]]:
    """By baseline, a curve for each layer and width where it was measured."""
    found: dict[str, dict[tuple[int, int], Curve]] = {}
    for sae in evidence.at(kind) if measure.baseline else ():
        for name, its in evidence.metrics[sae.folder]["baselines"].items():
            value, l0 = its.get(measure.baseline), its.get("l0") or sae.metrics.l0
            if name in BASELINES and value is not None and l0 > 0:
                found.setdefault(name, {}).setdefault((sae.layer, sae.width), []).append((l0, value))
    if measure.baseline == "fvu_usual" and "random_model" not in found:
        for row in evidence.slices.get("random_model", {}).get("rows", []):
            if kind_of(row) == kind and row["l0"] > 0:
                place = (layer_of(row), row["width"])
                found.setdefault("random_model", {}).setdefault(place, []).append((row["l0"], row["fvu_usual"]))
    return {name: list(places.values()) for name, places in found.items()}


def band(curves: Sequence[Curve]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "3 n"]]:
    """L0s within the reach of every curve, and the lowest, middle and highest value there; empty where they do not meet.

    Curves run straight between their points in log L0; points of one L0 count as one, at their mean.
    """
    merged = []
    for curve in curves:
        places, which = np.unique([l0 for l0, _ in curve], return_inverse=True)
        merged.append((np.log(places), np.bincount(which, weights=[value for _, value in curve]) / np.bincount(which)))
    low, high = max(places[0] for places, _ in merged), min(places[-1] for places, _ in merged)
    if low > high:
        return np.empty(0), np.empty((3, 0))
    grid = np.unique(np.linspace(low, high, GRID))
    values = np.stack([np.interp(grid, places, its) for places, its in merged])
    return np.exp(grid), np.stack([values.min(0), np.median(values, axis=0), values.max(0)])


def _draw(
    axes: Axes, *, evidence: Evidence, measure: FidelityMeasure, kind: SiteKind, curves: dict[SiteKind, dict[str, list[Curve]]]
) -> None:
    for name, layers in curves[kind].items():
        l0s, (low, middle, high) = band(layers)
        axes.fill_between(l0s, low, high, color=NEUTRAL, alpha=0.13, linewidth=0, zorder=1)
        axes.plot(l0s, middle, color=NEUTRAL, linestyle=BASELINES[name][1], linewidth=1.1, zorder=2)
    for layer, colour in evidence.layers.items():
        for width, marker in evidence.widths.items():
            draw_line(axes, evidence.at(kind), layer, width, measure, colour, marker)
    scale_l0(axes, [sae.metrics.l0 for sae in evidence.index.saes])
    values = [value for sae in evidence.index.saes if (value := measure.of(sae)) is not None]
    values += [max(interval) for sae in evidence.index.saes if (interval := measure.interval(sae)) is not None]
    values += [value for layers in curves.values() for found in layers.values() for curve in found for _, value in curve]
    scale_value(axes, values, is_logarithmic=True)
    axes.set_ylabel(measure.label)


def draw_line(
    axes: Axes, saes: Sequence[SaeRecord], layer: int, width: int, measure: FidelityMeasure, colour: str, marker: str
) -> None:
    """The SAEs of one layer and width, from sparse to dense, with their intervals."""
    here = sorted((sae for sae in saes if (sae.layer, sae.width) == (layer, width)), key=lambda sae: sae.metrics.l0)
    known = [(sae, value) for sae in here if (value := measure.of(sae)) is not None]
    if not known:
        return
    l0s, values = [max(sae.metrics.l0, LOWEST_L0) for sae, _ in known], [value for _, value in known]
    across = bars(l0s, [sae.metrics.intervals.l0 for sae, _ in known])
    upright = bars(values, [measure.interval(sae) for sae, _ in known])
    axes.errorbar(l0s, values, xerr=across, yerr=upright, color=colour, marker=marker, elinewidth=0.8, linewidth=1.3, zorder=3)
