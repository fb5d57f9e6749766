"""Colours, markers and matplotlib settings of every figure.

Layers run from blue over mauve to orange, as on pages; sites have a hue and a marker each. Both sets stay apart for red-green
blind eyes and stand out on white as on black. Text and axes have two marker colours of their own, CSS variables in SVG.
"""

from collections.abc import Iterable
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex

from everyscope.sites.names import SITE_KINDS, SiteKind

INK, FAINT, NEUTRAL = "#1c2330", "#c9ced6", "#8d939d"
"""Text, grid, and what no site or layer owns; the first two become var(--ink) and var(--rule) in SVG."""
LAYERS = LinearSegmentedColormap.from_list("layers", ["#2f7fd0", "#8a74b0", "#c0708a", "#dc7436"])
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Width markers, narrow to wide."""
DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.6)), (0, (5, 2, 1, 2)))
"""Line styles where colour alone does not distinguish the lines."""
SITE_COLOURS: dict[SiteKind, str] = {
    "attn_out": "#2f7fd0",
    "mlp_out": "#e08a1e",
    "resid_post": "#159a78",
    "embed": "#b866a5",
    "mlp_in": "#7a6bd1",
    "resid_mid": "#6b7f33",
    "transcoder": "#c2452d",
    "resid_transcoder": "#8c5a3c",
}
SITE_MARKERS: dict[SiteKind, str] = dict(zip(SITE_KINDS, (*MARKERS, "X", "*"), strict=True))
RELATIONS = {"matched": "#2f7fd0", "split": "#e08a1e", "new": "#9aa1ab"}
"""What a latent of a wider SAE is to the narrower one."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "everyscope",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
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
    "axes.axisbelow": True,
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
    "lines.markeredgewidth": 0,
    "savefig.dpi": 160,
}


def layer_colours(layers: Iterable[int]) -> dict[int, str]:
    """A colour for each layer."""
    ordered = sorted(set(layers))
    return {layer: to_hex(LAYERS(place / max(1, len(ordered) - 1))) for place, layer in enumerate(ordered)}


def width_markers(widths: Iterable[int]) -> dict[int, str]:
    """A marker for each width [latents]."""
    return {width: MARKERS[place % len(MARKERS)] for place, width in enumerate(sorted(set(widths)))}
