"""A picture is some panels with one legend: on the page each panel is an SVG that follows the page's colours; beside the page lie
the whole picture as PDF and PNG, with title and legend.

Nothing random or dated enters a file: equal numbers give equal bytes.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Patch

from everyscope.base.files import whole_file
from everyscope.publish.drawing.palette import FAINT, INK, NEUTRAL, STYLE

FORMATS = ("png", "pdf")
"""What lies beside the page."""


@dataclass(frozen=True)
class LegendKey:
    """One line of a legend: a colour, a marker or a line style, or some of them."""

    label: str
    colour: str = NEUTRAL
    marker: str | None = None
    line: Any = None
    """A matplotlib line style; None draws no line."""
    is_filled: bool = False
    """A patch of colour, for bars."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.6, 3.0)
    """Width and height [inches]."""


@dataclass(frozen=True)
class Picture:
    """Some panels of one kind."""

    file: str
    """Stem of its files in report/."""
    title: str
    panels: tuple[Panel, ...]
    keys: tuple[LegendKey, ...] = field(default=())
    columns: int = 3
    """Panels side by side in PDF and PNG."""

    @property
    def files(self) -> list[str]:
        """Names of its files."""
        return [f"{self.file}.{form}" for form in FORMATS]


def panel_svg(panel: Panel) -> str:
    """A panel as SVG to stand in a page, in the page's own colours and font."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _for_page(buffer.getvalue(), panel.title)


def write_picture(folder: Path, picture: Picture, basis: str) -> None:
    """The picture as PDF and PNG, `basis` (tokens, data, mask) under its title."""
    with matplotlib.rc_context(STYLE):
        figure = _whole_figure(picture, basis)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout stands; each format would search for it again
        for name in picture.files:
            form = name.rpartition(".")[2]
            metadata = {"Software": None} if form == "png" else {"CreationDate": None, "Creator": None, "Producer": None}
            with whole_file(folder / name) as partial:
                figure.savefig(partial, format=form, metadata=metadata, facecolor="white")


def _whole_figure(picture: Picture, basis: str) -> Figure:
    columns = min(picture.columns, len(picture.panels))
    rows = ceil(len(picture.panels) / columns)
    width, height = picture.panels[0].size
    legend = 1.75 if picture.keys else 0.0
    size = (max(columns * width + legend, 6.5), rows * height + 0.55)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(places, picture.panels, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title)
    for axes in places[len(picture.panels) :]:
        axes.remove()
    lines = [picture.title, *wrap(basis, int(size[0] * 15))]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5)
    if picture.keys:
        figure.legend(handles=[_handle(key) for key in picture.keys], loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _handle(key: LegendKey) -> Line2D | Patch:
    if key.is_filled:
        return Patch(color=key.colour, label=key.label)
    style = "" if key.line is None else key.line
    return Line2D([], [], color=key.colour, marker=key.marker or "", linestyle=style, label=key.label)


def key_svg(key: LegendKey) -> str:
    """A legend's sign as a little SVG: 26 by 12, its colour from the key, neutral ones from the page."""
    colour = "var(--soft)" if key.colour == NEUTRAL else key.colour
    parts = [f'<rect x="5" y="2" width="16" height="8" rx="1.5" fill="{colour}"/>'] if key.is_filled else []
    if key.line is not None:
        dashes = "" if isinstance(key.line, str) else f' stroke-dasharray="{" ".join(f"{1.8 * part:g}" for part in key.line[1])}"'
        parts.append(f'<line x1="1" y1="6" x2="25" y2="6" stroke="{colour}" stroke-width="2"{dashes}/>')
    if key.marker:
        style = MarkerStyle(key.marker)
        outline = style.get_path().transformed(style.get_transform())
        points = np.concatenate([np.asarray(polygon) for polygon in outline.to_polygons()])
        coordinates = " ".join(f"{13 + 9 * x:.2f},{6 - 9 * y:.2f}" for x, y in points)
        parts.append(f'<polygon points="{coordinates}" fill="{colour}"/>')
    return f'<svg class="mark" viewBox="0 0 26 12" aria-hidden="true">{"".join(parts)}</svg>'


def _for_page(svg: str, title: str) -> str:
    """SVG as it stands in HTML: without prologue and namespaces, its size left to the page, its colours and font the page's."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1)
    # Names of groups repeat from figure to figure, and nothing refers to them; those of clips and markers are hashes.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text).replace("xlink:href", "href")
    return text.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)").replace("'DejaVu Sans'", "var(--font)")
