"""Panels of dots with interval bars: rows are conditions, colours layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from everyscope.publish.drawing.palette import NEUTRAL
from everyscope.publish.drawing.scales import bars, is_mostly_positive, scale_log
from everyscope.suite.records import Interval

FEW_TICKS = 5
"""Ticks of an axis whose labels stand side by side, at most."""


@dataclass(frozen=True)
class Dot:
    """One number of one SAE under one condition."""

    row: str
    """The condition."""
    value: float
    interval: Interval | None
    colour: str
    marker: str = "o"


def draw_dots(
    axes: Axes, dots: Sequence[Dot], rows: Sequence[str], values: Sequence[float], label: str, *, is_logarithmic: bool
) -> None:
    """`dots` in `rows`, top to bottom, one beside the other; `values` are all that the x axis must hold."""
    for place, row in enumerate(rows):
        here = [dot for dot in dots if dot.row == row]
        for number, dot in enumerate(here):
            # spread over two thirds of the row, so that bars do not cover one another
            height = place + (0.0 if len(here) == 1 else (number / (len(here) - 1) - 0.5) * 0.62)
            length = bars([dot.value], [dot.interval])
            axes.errorbar([dot.value], [height], xerr=length, color=dot.colour, marker=dot.marker, markersize=4, elinewidth=0.9)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if is_logarithmic and is_mostly_positive(values):
        scale_log(axes.xaxis, values)
    elif values:
        low, high = min(0.0, *values), max(0.0, *values)
        spread = high - low or 1.0
        axes.set_xlim(low - (0.06 * spread if low < 0 else 0), high + 0.06 * spread)
        axes.xaxis.set_major_locator(MaxNLocator(FEW_TICKS))
        if low < 0:
            axes.axvline(0, color=NEUTRAL, linewidth=0.9, zorder=1)
    axes.set_xlabel(label)


def interval_of(row: dict, name: str) -> Interval | None:
    """The interval of a slice's row, if it has one."""
    found = (row.get("intervals") or {}).get(name)
    return None if found is None else (found[0], found[1])
