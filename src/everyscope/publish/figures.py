"""The report's figures, drawn with matplotlib: as SVG that follows the page's colours, and as PNG for READMEs.

Text and axes are drawn in two marker colours that become CSS variables, so that one SVG serves light and dark pages. Nothing
random or dated enters a file: equal records give equal bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from everyscope.base.files import whole_file
from everyscope.sites.names import SITE_KINDS, SiteKind
from everyscope.suite.layout import width_label
from everyscope.suite.records import SaeRecord, SuiteIndex

INK, FAINT, BASELINE = "#1c2330", "#c9ced6", "#8d939d"
"""Text, grid and PCA baseline; the first two become var(--ink) and var(--rule) in SVG."""
LAYERS = LinearSegmentedColormap.from_list("layers", ["#2f7fd0", "#7a68d8", "#c9559b", "#e07a3c"])
"""Layer colours, first to last: all of middle lightness, so that they stand out on white and on black."""
HEAT = LinearSegmentedColormap.from_list("heat", ["#eef3f9", "#a9c6e6", "#4f86c2", "#1f4e86"])
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Width markers, narrow to wide."""
SITE_TITLES: dict[SiteKind, str] = {
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "resid_post": "Residual stream",
    "embed": "Embedding",
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "everyscope",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Measure:
    """A number drawn against L0."""

    file: str
    """Stem of its PNG."""
    label: str
    """Its axis label, with unit."""
    of: Callable[[SaeRecord], float | None]
    baseline: Callable[[SaeRecord], float] | None
    """The PCA baseline at the same L0, where there is one."""
    is_logarithmic: bool = False
    """Whether sites whose values lie decades apart share an axis; drawn linear all the same where a value is not positive."""


FVU = Measure("fvu_against_l0", "FVU [1]", lambda sae: sae.metrics.fvu, lambda sae: sae.metrics.fvu_pca)
DELTA_LOSS = Measure("delta_loss_against_l0", "Delta loss [nats/token]", lambda sae: sae.metrics.delta_loss, None, True)
RECOVERED = Measure("loss_recovered", "Loss recovered [1]", lambda sae: sae.metrics.loss_recovered, None)


def kinds_of(index: SuiteIndex) -> list[SiteKind]:
    """The kinds of site in a suite, in the order of the house."""
    present = {sae.site for sae in index.saes}
    return [kind for kind in SITE_KINDS if kind in present]


def layer_colours(index: SuiteIndex) -> dict[int, str]:
    """A colour for each layer of a suite."""
    layers = sorted({sae.layer for sae in index.saes})
    return {layer: to_hex(LAYERS(place / max(1, len(layers) - 1))) for place, layer in enumerate(layers)}


def width_markers(index: SuiteIndex) -> dict[int, str]:
    """A matplotlib marker for each width of a suite."""
    return {width: MARKERS[place % len(MARKERS)] for place, width in enumerate(sorted({sae.width for sae in index.saes}))}


def middle_saes(index: SuiteIndex) -> dict[tuple[SiteKind, int], SaeRecord]:
    """At each site, the narrowest width's SAE of middle L0."""
    chosen: dict[tuple[SiteKind, int], SaeRecord] = {}
    for where in sorted({sae.where for sae in index.saes}):
        here = [sae for sae in index.saes if sae.where == where]
        narrow = [sae for sae in here if sae.width == min(sae.width for sae in here)]
        middle = median_low(sorted(sae.metrics.l0 for sae in narrow))
        chosen[where.kind, where.layer] = next(sae for sae in narrow if sae.metrics.l0 == middle)
    return chosen


def panel_svg(index: SuiteIndex, measure: Measure, kind: SiteKind) -> str:
    """`measure` against L0 at one kind of site, as SVG to stand in a page. The axes are those of all kinds, to compare them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.0), layout="constrained")
        draw_panel(figure.add_subplot(), index, measure, kind)
        return _svg(figure)


def panels_png(path: Path, index: SuiteIndex, measure: Measure, title: str) -> None:
    """`measure` against L0, one column per kind of site, with legend and `title`, as a PNG for READMEs."""
    kinds = kinds_of(index)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.1 * len(kinds), 3.6), layout="constrained")
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            draw_panel(panel, index, measure, kind)
            panel.set_title(SITE_TITLES[kind])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.legend(handles=_legend(index, measure), loc="outside right upper", frameon=False, fontsize=8)
        _png(path, figure)


def draw_panel(axes: Axes, index: SuiteIndex, measure: Measure, kind: SiteKind) -> None:
    """One panel: colour is the layer, the marker the width, grey dashes the PCA baseline of the layers."""
    colours, markers = layer_colours(index), width_markers(index)
    for layer, colour in colours.items():
        here = [sae for sae in index.saes if (sae.site, sae.layer) == (kind, layer)]
        if measure.baseline and here:
            by_l0 = sorted(here, key=lambda sae: sae.metrics.l0)
            axes.plot(*_points(by_l0, measure.baseline), color=BASELINE, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        for width, marker in markers.items():
            line = sorted((sae for sae in here if sae.width == width), key=lambda sae: sae.metrics.l0)
            axes.plot(*_points(line, measure.of), color=colour, marker=marker, markeredgewidth=0, zorder=2)
    _scale_axes(axes, index, measure)


def _points(saes: Sequence[SaeRecord], of: Callable[[SaeRecord], float | None]) -> tuple[list[float], list[float]]:
    pairs = [(max(sae.metrics.l0, 0.1), value) for sae in saes if (value := of(sae)) is not None]
    return [l0 for l0, _ in pairs], [value for _, value in pairs]


def _scale_axes(axes: Axes, index: SuiteIndex, measure: Measure) -> None:
    values = [value for sae in index.saes if (value := measure.of(sae)) is not None]
    values += [measure.baseline(sae) for sae in index.saes] if measure.baseline else []
    l0s = [max(sae.metrics.l0, 0.1) for sae in index.saes]
    axes.set_xscale("log")
    axes.set_xlim(min(l0s) / 1.25, max(l0s) * 1.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if measure.is_logarithmic and values and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif values:
        low, high = min(0.0, *values), max(values)
        axes.set_ylim(low, high + 0.05 * (high - low or 1))
    axes.set_xlabel("L0 [latents]")
    axes.set_ylabel(measure.label)


def _legend(index: SuiteIndex, measure: Measure) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, label=f"layer {layer}") for layer, colour in layer_colours(index).items()]
    handles += [
        Line2D([], [], color=BASELINE, marker=marker, linestyle="", label=f"width {width_label(width)}")
        for width, marker in width_markers(index).items()
    ]
    if measure.baseline:
        handles.append(Line2D([], [], color=BASELINE, linestyle=(0, (4, 3)), linewidth=0.9, label="PCA, L0 components"))
    return handles


def heat_svg(index: SuiteIndex, measure: Measure) -> str:
    """`measure` of the middle SAE at each layer (row) and kind of site (column), as SVG to stand in a page."""
    with matplotlib.rc_context(STYLE):
        figure = _heat(index, measure)
        return _svg(figure)


def heat_png(path: Path, index: SuiteIndex, measure: Measure, title: str) -> None:
    """The same as a PNG with `title`."""
    with matplotlib.rc_context(STYLE):
        figure = _heat(index, measure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        _png(path, figure)


def _heat(index: SuiteIndex, measure: Measure) -> Figure:
    kinds, layers, middle = kinds_of(index), sorted(layer_colours(index)), middle_saes(index)
    values = [[_value(measure, middle.get((kind, layer))) for kind in kinds] for layer in layers]
    known = [value for row in values for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    figure = Figure(figsize=(1.2 + 1.1 * len(kinds), 1.0 + 0.36 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=False)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value is None:
                continue
            shade = (value - low) / (high - low or 1)
            axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color=HEAT(shade), linewidth=0)
            ink = "#ffffff" if shade > 0.55 else "#1a2230"  # not INK: a cell is as light or dark on every page
            axes.text(column + 0.5, row + 0.5, f"{value:.3f}", ha="center", va="center", fontsize=8.5, color=ink)
    axes.set_xlim(0, len(kinds))
    axes.set_ylim(len(layers), 0)
    axes.set_xticks([place + 0.5 for place in range(len(kinds))], list(kinds))
    axes.set_yticks([place + 0.5 for place in range(len(layers))], [f"layer {layer}" for layer in layers])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _value(measure: Measure, sae: SaeRecord | None) -> float | None:
    return None if sae is None else measure.of(sae)


def _png(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None}, facecolor="white")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML, SVG needs no namespaces; without them, and with sizes left to the page, one tag says it all.
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    # Names of groups repeat from figure to figure, and nothing refers to them; those of clips and markers are hashes.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text).replace("xlink:href", "href")
    return text.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)").replace("'DejaVu Sans'", "var(--font)")
