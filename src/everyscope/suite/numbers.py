"""Numbers with their intervals, as texts. Torch-free."""

import math
from collections.abc import Sequence


def number_text(value: float, interval: Sequence[float] | None, is_tied: bool = False) -> str:
    """As in 0.139±.004, with = before it where it ties."""
    text = f"{value:z.3f}" if abs(value) < 10 else f"{value:.1f}"
    if interval is not None:
        half = math.ceil((interval[1] - interval[0]) / 2 * 1000 - 1e-9) / 1000
        text += f"±{half:.3f}".replace("±0.", "±.") if abs(value) < 10 else f"±{half:.1f}"
    return f"= {text}" if is_tied else text


def interval_text(interval: Sequence[float] | None) -> str:
    """As in [0.135, 0.143]; a dash where there is none."""
    return "–" if interval is None else f"[{interval[0]:z.3f}, {interval[1]:z.3f}]"
