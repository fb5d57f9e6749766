"""From position to position: what the canonical SAEs reach early and late in a block."""

from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from everyscope.publish.drawing.pictures import Panel, Picture
from everyscope.publish.drawing.scales import scale_log, scale_value
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import Section
from everyscope.sites.names import SITE_TITLES, SiteKind
from everyscope.suite.positions import Curve, position_delta_loss, position_fvu, relative_error
from everyscope.suite.records import SaeRecord


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
