"""Axes that fit their numbers: logarithmic where that can be, with ticks that people read."""

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

LOWEST_L0 = 0.1
"""Where an SAE that hardly ever fires stands on a logarithmic axis [latents]."""
SMALLEST = 1e-4
"""The smallest part of its highest value that a logarithmic axis shows [1]."""
MOSTLY = 0.75
"""Share of values above 0 from which on an axis may be logarithmic [1]."""


def is_mostly_positive(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis loses little."""
    return bool(values) and sum(value > 0 for value in values) >= MOSTLY * len(values)


def scale_log(axis: Axis, values: Iterable[float], margin: float = 1.25) -> None:
    """A logarithmic axis that holds those of `values` that are above 0, with ticks at 1, 2, 5 where the range is small.

    Lines to others leave it below, and so do those to values that are a vanishing part of the highest.
    """
    found = [value for value in values if value > 0]
    high = max(found) * margin
    low = max(min(found), max(found) * SMALLEST) / margin
    if high / low < 2:  # a range too short to hold ticks
        middle = math.sqrt(low * high)
        low, high = middle / 1.5, middle * 1.5
    axes, is_x = axis.axes, isinstance(axis, XAxis)
    (axes.set_xscale if is_x else axes.set_yscale)("log")
    (axes.set_xlim if is_x else axes.set_ylim)(low, high)
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3 else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def scale_value(axes: Axes, values: Sequence[float], *, is_logarithmic: bool) -> None:
    """The y axis for `values`: logarithmic if asked for and most are above 0, else linear, from 0 where nothing is below."""
    if not values:
        return
    if is_logarithmic and is_mostly_positive(values):
        scale_log(axes.yaxis, values)
        return
    low, high = min(0.0, *values), max(0.0, *values)
    spread = high - low or 1.0
    axes.set_ylim(low - (0.05 * spread if low < 0 else 0), high + 0.06 * spread)


def scale_l0(axes: Axes, l0s: Iterable[float]) -> None:
    """The x axis for L0s [latents]."""
    scale_log(axes.xaxis, [max(l0, LOWEST_L0) for l0 in l0s])
    axes.set_xlabel("L0 [latents]")


def bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> list[list[float]]:
    """Lengths of interval bars below and above `values`; none where there is no interval."""
    ends = [(value, value) if interval is None else interval for value, interval in zip(values, intervals, strict=True)]
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
