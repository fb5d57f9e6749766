"""The figures that lead on: the heat map of layers and sites, and the Pareto plot, whose every cell and point is a link.

static/pareto.js lets a Pareto plot be zoomed; without it the plot is the same, still.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from everyscope.browse.svg.elements import Scale, element, frame, padded, picture

STEPS = 8
"""Shades of a heat map, classes h0 to h8."""
MARKS = ("circle", "square", "triangle", "diamond")
LAYER_STEPS = 12
"""Classes of layer colours, l0 to l11, from the first layer to the last."""


@dataclass(frozen=True)
class HeatmapCell:
    """One cell of a heat map."""

    row: int
    column: int
    value: float
    href: str | None
    tip: str


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[HeatmapCell], ends: tuple[float, float], label: str
) -> Markup:
    """Cells shaded from the lowest to the highest of `ends`, their values written in."""
    left, top, wide, tall = 62.0, 22.0, 78.0, 30.0 if len(rows) <= 16 else 20.0
    parts = [
        element("text", name, class_="axis", x=left + wide * (place + 0.5), y=13, text_anchor="middle")
        for place, name in enumerate(columns)
    ]
    parts += [
        element("text", name, class_="axis", x=left - 8, y=top + tall * (place + 0.5) + 4, text_anchor="end")
        for place, name in enumerate(rows)
    ]
    low, high = ends
    for cell in cells:
        shade = round(STEPS * (cell.value - low) / ((high - low) or 1.0))
        x, y = left + wide * cell.column, top + tall * cell.row
        box = element("rect", x=x + 1, y=y + 1, width=wide - 2, height=tall - 2, rx=4)
        text = element("text", f"{cell.value:.3f}", x=x + wide / 2, y=y + tall / 2 + 4, text_anchor="middle")
        shown = element("g", box, text, class_=f"cell h{max(0, min(STEPS, shade))}", data_tip=cell.tip)
        parts.append(element("a", shown, href=cell.href, aria_label=cell.tip))
    return picture(
        left + wide * len(columns) + 4, top + tall * len(rows) + 4, label, *parts, is_static=False, class_=f"heat c{len(columns)}"
    )


@dataclass(frozen=True)
class Point:
    """One SAE of a Pareto plot."""

    l0: float
    value: float
    interval: tuple[float, float] | None
    """Of `value`."""
    layer_step: int
    """Its layer's colour, from 0 to LAYER_STEPS - 1."""
    mark: int
    """Its width's mark, from 0."""
    line: tuple[int, int]
    """Layer and width: points with the same are joined."""
    is_canonical: bool
    href: str | None
    tip: str


def layer_step(layer: int, layers: Sequence[int]) -> int:
    """The colour class of `layer` among `layers`, which are in order."""
    return round((LAYER_STEPS - 1) * layers.index(layer) / max(1, len(layers) - 1))


def mark(kind: int, size: float = 4.6) -> Markup:
    """The mark of the `kind`-th width around the origin."""
    name = MARKS[kind % len(MARKS)]
    if name == "circle":
        return element("circle", r=size)
    if name == "square":
        return element("rect", x=-0.88 * size, y=-0.88 * size, width=1.76 * size, height=1.76 * size)
    points = {"triangle": [(0, -1.2), (1.1, 0.85), (-1.1, 0.85)], "diamond": [(0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)]}[name]
    return element("polygon", points=" ".join(f"{x * size:.2f},{y * size:.2f}" for x, y in points))


def pareto(
    points: Sequence[Point],
    baseline: Sequence[Sequence[tuple[float, float]]],
    ends: tuple[tuple[float, float], tuple[float, float]],
    y_label: str,
    label: str,
    identity: str,
) -> Markup:
    """`value` against L0, both logarithmic where every value of `ends` is positive; `baseline` are lines to stay below."""
    width, height = 380.0, 300.0
    (x_low, x_high), (y_low, y_high) = ends
    x = Scale(x_low, x_high, 52, width - 10, is_log=True)
    y = Scale(y_low, y_high, height - 42, 26, is_log=y_low > 0)
    shape = {
        "data_x": f"{x.low:.6g} {x.high:.6g} {x.start:g} {x.stop:g} log",
        "data_y": f"{y.low:.6g} {y.high:.6g} {y.start:g} {y.stop:g} {'log' if y.is_log else 'linear'}",
    }
    clip = element(
        "clipPath",
        element("rect", x=x.start - 6, y=y.stop - 6, width=x.stop - x.start + 12, height=y.start - y.stop + 9),
        id=identity,
    )
    inside = [element("path", class_="pca", d=_path(line, x, y)) for line in baseline]
    for line in sorted({point.line for point in points}):
        here = sorted((point for point in points if point.line == line), key=lambda point: point.l0)
        inside.append(
            element("path", class_=f"join l{here[0].layer_step}", d=_path([(point.l0, point.value) for point in here], x, y))
        )
    inside += [_point(point, x, y) for point in points]
    plot = element("g", element("g", *inside, class_="moving"), clip_path=f"url(#{identity})")
    axes = frame(x, y, "L0 [latents]", y_label)
    back = element("rect", class_="back", x=x.start, y=y.stop, width=x.stop - x.start, height=y.start - y.stop)
    return picture(width, height, label, clip, axes, back, plot, is_static=False, class_="chart pareto", **shape)


def _point(point: Point, x: Scale, y: Scale) -> Markup:
    across, down = x(point.l0), y(point.value)
    parts = []
    if point.interval:
        low, high = (y(end) - down for end in point.interval)
        parts.append(element("line", class_="interval", x1=0, x2=0, y1=low, y2=high, data_low=low, data_high=high))
    if point.is_canonical:
        parts.append(element("circle", class_="canonical", r=8.5))
    parts += [mark(point.mark), element("circle", class_="hit", r=6)]
    dot = element(
        "g",
        *parts,
        class_=f"point l{point.layer_step}",
        transform=f"translate({across:.1f} {down:.1f})",
        data_at=f"{across:.1f} {down:.1f}",
        data_tip=point.tip,
    )
    return element("a", dot, href=point.href, aria_label=point.tip)


def _path(line: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "".join(f"{'L' if place else 'M'}{x(l0):.1f} {y(value):.1f}" for place, (l0, value) in enumerate(line))


def pareto_ends(points: Sequence[Point], baseline: Sequence[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axes that hold all `points` and `baseline` values: those of several plots together make them comparable."""
    values = [value for value in (*(point.value for point in points), *baseline) if math.isfinite(value)]
    is_log = bool(values) and min(values) > 0
    return padded([max(point.l0, 0.1) for point in points], is_log=True), padded(values, is_log=is_log)
