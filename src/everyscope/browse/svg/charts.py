"""The plain figures: histograms, curves, values with intervals, profiles. Small, for they stand beside one another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from everyscope.base.progress import human_count
from everyscope.browse.svg.elements import Scale, element, frame, linear_ticks, log_ticks, padded, picture, tick_text

WIDTH, HEIGHT = 360.0, 214.0
"""Of a figure in its own pixels; the page scales it [px]."""
LEFT, RIGHT, TOP, BOTTOM = 50.0, 8.0, 24.0, 42.0
SERIES = 6
"""Classes of curves, s0 to s5."""


def _scales(x: tuple[float, float], y: tuple[float, float], *, x_log: bool = False, y_log: bool = False) -> tuple[Scale, Scale]:
    return (
        Scale(*x, LEFT, WIDTH - RIGHT, x_log),
        Scale(*y, HEIGHT - BOTTOM, TOP, y_log),
    )


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_label: str,
    y_label: str,
    label: str,
    *,
    is_tall_log: bool = False,
    marks: Sequence[float] = (),
) -> Markup:
    """Bars between `edges`; with `is_tall_log` their heights are log10(1 + count), for tails that else vanish.

    A line stands at each of `marks`, those outside at the nearest end. Scripts find the scale in data-x: both edges in units of
    the axis, then in pixels, and the line's ends.
    """
    height = [math.log10(1 + count) for count in counts] if is_tall_log else [float(count) for count in counts]
    x, y = _scales((edges[0], edges[-1]), (0.0, max([*height, 1e-9]) * 1.05))
    bars = []
    for place, value in enumerate(height):
        left, right = x(edges[place]), x(edges[place + 1])
        unit = y_label[:-1] if counts[place] == 1 and y_label.endswith("s") else y_label
        tip = f"{counts[place]:,.0f} {unit} at {x_label} {edges[place]:.3g} to {edges[place + 1]:.3g}"
        top = min(y(value), y.start - (1.0 if counts[place] else 0.0))
        bar = element("rect", class_="bar", x=left + 0.5, y=top, width=max(0.5, right - left - 1), height=y.start - top)
        hit = element("rect", class_="hit", x=left, y=TOP, width=max(0.5, right - left), height=y.start - TOP, data_tip=tip)
        bars += [bar, hit]
    axis = _count_frame(x, y, x_label, y_label) if is_tall_log else frame(x, y, x_label, y_label)
    for mark in marks:
        place = x(min(max(mark, edges[0]), edges[-1]))
        bars.append(element("line", class_="tried", x1=place, x2=place, y1=TOP, y2=y.start, data_tip=f"{mark:.3g}"))
    scale = f"{edges[0]:.6g} {edges[-1]:.6g} {x.start:g} {x.stop:g} {TOP:g} {y.start:g}"
    return picture(WIDTH, HEIGHT, label, axis, *bars, class_="chart", data_x=scale)


def _count_frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    """A frame whose heights are log10(1 + count), labelled with counts."""
    bare = frame(x, Scale(0.0, 0.0, y.start, y.stop), x_label, y_label)
    first = 1 if y.high > 2 else 0  # further down, labels would lie on one another
    steps = [0.0, *(math.log10(1 + 10.0**power) for power in range(first, int(y.high) + 1))]
    lines = []
    for step in steps:
        count = round(10**step - 1)
        lines.append(element("line", class_="grid", x1=x.start, x2=x.stop, y1=y(step), y2=y(step)))
        text = human_count(count)
        lines.append(element("text", text, class_="tick", x=x.start - 5, y=y(step) + 4, text_anchor="end"))
    return Markup("").join([*lines, bare])


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    name: str
    points: Sequence[tuple[float, float | None]]
    """From left to right; None breaks the line."""


def curves(
    lines: Sequence[Curve], x_label: str, y_label: str, label: str, *, x_log: bool = False, from_zero: bool = True
) -> Markup:
    """Lines over one axis; their names stand in the page's legend."""
    known = [(x, y) for line in lines for x, y in line.points if y is not None and math.isfinite(y)]
    x_ends = (min(x for x, _ in known), max(x for x, _ in known)) if known else (0.0, 1.0)
    x, y = _scales(x_ends, padded([y for _, y in known], is_log=False, from_zero=from_zero), x_log=x_log)
    parts = [frame(x, y, x_label, y_label)]
    for number, line in enumerate(lines):
        path, is_down = [], False
        for place, value in line.points:
            if value is None or not math.isfinite(value):
                is_down = False
                continue
            path.append(f"{'L' if is_down else 'M'}{x(place):.1f} {y(value):.1f}")
            is_down = True
        parts.append(element("path", class_=f"curve s{number % SERIES}", d="".join(path)))
        parts += [
            element("circle", class_="hit", cx=x(place), cy=y(value), r=5, data_tip=f"{line.name} {place:g}: {value:.4g}")
            for place, value in line.points
            if value is not None and math.isfinite(value)
        ]
    return picture(WIDTH, HEIGHT, label, *parts, class_="chart")


@dataclass(frozen=True)
class Estimate:
    """One value with its interval, as a dot and a line."""

    name: str
    value: float | None
    interval: tuple[float, float] | None
    is_baseline: bool
    """Whether it is what the others are compared with, drawn hollow."""


def estimates(found: Sequence[Estimate], x_label: str, label: str) -> Markup:
    """Values under one another on one axis, which is logarithmic where all are positive and far apart."""
    known = [item.value for item in found if item.value is not None]
    known += [end for item in found if item.interval for end in item.interval]
    is_log = bool(known) and min(known) > 0 and max(known) / min(known) > 20
    row, left = 24.0, 130.0
    height = row * len(found) + 42
    x = Scale(*padded(known, is_log=is_log, from_zero=True), left, WIDTH - 58, is_log)
    parts = []
    for tick in (log_ticks if is_log else linear_ticks)(x.low, x.high, 4):
        parts.append(element("line", class_="grid", x1=x(tick), x2=x(tick), y1=4, y2=row * len(found) + 4))
        parts.append(element("text", tick_text(tick), class_="tick", x=x(tick), y=height - 22, text_anchor="middle"))
    parts.append(element("text", x_label, class_="axis", x=(left + WIDTH - 58) / 2, y=height - 5, text_anchor="middle"))
    for place, item in enumerate(found):
        y = row * place + 15.0
        parts.append(element("text", item.name, class_="name", x=left - 8, y=y + 4.5, text_anchor="end"))
        if item.interval:
            parts.append(element("line", class_="interval", x1=x(item.interval[0]), x2=x(item.interval[1]), y1=y, y2=y))
        if item.value is not None:
            parts.append(element("circle", class_="hollow" if item.is_baseline else "dot", cx=x(item.value), cy=y, r=4))
        text = "–" if item.value is None else f"{item.value:.3g}"
        parts.append(element("text", text, class_="value", x=WIDTH - 4, y=y + 4.5, text_anchor="end"))
    return picture(WIDTH, height, label, *parts, class_="chart")


def profile(values: Sequence[float | None], label: str, tips: Sequence[str]) -> Markup:
    """A few bars without axes; `tips` says each one's value."""
    known = [value or 0.0 for value in values]
    top, width, height = max([*known, 1e-12]), 240.0, 46.0
    step = width / max(1, len(known))
    bars = []
    for place, value in enumerate(known):
        tall = max(1.0, (height - 4) * value / top)
        bars.append(element("rect", class_="bar", x=place * step + 1, y=height - tall, width=step - 2, height=tall))
        bars.append(element("rect", class_="hit", x=place * step, y=0, width=step, height=height, data_tip=tips[place]))
    return picture(width, height, label, *bars, class_="chart profile")


def gauge(value: float | None, interval: tuple[float, float] | None, null: float | None, label: str) -> Markup:
    """A score between 0.5 (guessing) and 1 with its interval, and the score of shuffled labels as a mark."""
    width, height = 220.0, 26.0
    x = Scale(0.4, 1.0, 2, width - 2)

    def inside(score: float) -> float:
        return x(min(1.0, max(0.4, score)))

    parts = [
        element("rect", class_="rail", x=2, y=11, width=width - 4, height=4, rx=2),
        element("line", class_="guess", x1=x(0.5), x2=x(0.5), y1=5, y2=21),
    ]
    if value is not None:
        parts.append(element("rect", class_="bar", x=x(0.5), y=11, width=max(0.0, inside(value) - x(0.5)), height=4))
    if interval:
        parts.append(element("line", class_="interval", x1=inside(interval[0]), x2=inside(interval[1]), y1=13, y2=13))
    if null is not None:
        parts.append(element("path", class_="null", d=f"M{inside(null):.1f} 22l-4 4h8z"))
    if value is not None:
        parts.append(element("circle", class_="dot", cx=inside(value), cy=13, r=5))
    return picture(width, height, label, *parts, class_="gauge")
