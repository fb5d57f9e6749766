"""SVG as Markup: elements whose attributes and text are escaped, scales, ticks, and the frame around a plot.

Colours are classes of style.css, so that figures follow the page into the dark; nothing carries a style of its own, which the
pages' security policy would refuse.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

Part = Markup | str


def element(name: str, *inside: Part, **attributes: object) -> Markup:
    """One element; `class_` is its class, underscores are hyphens, None leaves an attribute out, text is escaped."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{pairs}>{''.join(str(escape(part)) for part in inside)}</{name}>")


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(width: float, height: float, label: str, *inside: Part, is_static: bool = True, **attributes: object) -> Markup:
    """The whole SVG; `label` is what it says to those who cannot see it. With links inside it is a group, not one picture."""
    role = "img" if is_static else "group"
    return element("svg", *inside, viewBox=f"0 0 {width:g} {height:g}", role=role, aria_label=label, **attributes)


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    """Value at `start`."""
    high: float
    """Value at `stop`."""
    start: float
    """Pixel of the low end [px]."""
    stop: float
    """Pixel of the high end [px]."""
    is_log: bool = False
    """Whether equal ratios are equally far apart; both ends are then positive."""

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        share = (self._along(value) - self._along(self.low)) / ((self._along(self.high) - self._along(self.low)) or 1.0)
        return self.start + share * (self.stop - self.start)

    def _along(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_log else value

    @property
    def ticks(self) -> list[float]:
        """Round values inside, about five."""
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; powers alone where those would be more than `count`, or, where the
    axis is short, values as on a linear one.
    """
    if high < 5 * low:
        return linear_ticks(low, high, 4)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in fine if low * 0.999 <= value <= high * 1.001]
    if len(inside) <= count:
        return inside
    decades = [10.0**power for power in powers if low * 0.999 <= 10.0**power <= high * 1.001]
    return decades[:: math.ceil(len(decades) / count)]


def tick_text(value: float) -> str:
    """A tick's label: short."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-4):
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10.0**power
        sign = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{sign}" if abs(factor - 1) < 1e-9 else f"{factor:.2g}·10{sign}"
    return f"{value:g}".replace("-", "−")


def padded(values: Iterable[float], *, is_log: bool, from_zero: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows all `values` with some air; 0 to 1 where there are none."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    if not known:
        return (0.1, 1.0) if is_log else (0.0, 1.0)
    low, high = min(known), max(known)
    if is_log:
        return low / 1.2, high * 1.2
    low = min(0.0, low) if from_zero else low
    air = 0.06 * ((high - low) or abs(high) or 1.0)
    return (low if from_zero and low == 0 else low - air), high + air


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    """Grid, ticks and labels of a plot; `y.start` is its lower edge."""
    parts = []
    for value in y.ticks:
        place = y(value)
        parts.append(element("line", class_="grid", x1=x.start, x2=x.stop, y1=place, y2=place))
        parts.append(element("text", tick_text(value), class_="tick", x=x.start - 5, y=place + 4, text_anchor="end"))
    for value in x.ticks:
        parts.append(element("text", tick_text(value), class_="tick", x=x(value), y=y.start + 16, text_anchor="middle"))
    parts.append(element("line", class_="base", x1=x.start, x2=x.stop, y1=y.start, y2=y.start))
    middle = (x.start + x.stop) / 2
    parts.append(element("text", x_label, class_="axis", x=middle, y=y.start + 34, text_anchor="middle"))
    parts.append(element("text", y_label, class_="axis", x=2, y=y.stop - 9))
    return element("g", *parts, class_="frame")
