"""How often latents fire."""

from functools import partial
from itertools import pairwise
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator

from everyscope.publish.drawing.palette import DASHES, NEUTRAL
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import Section
from everyscope.sites.names import SITE_TITLES, SiteKind
from everyscope.suite.layout import width_label

DENSE = -1.0
"""A latent that fires on more than 10^DENSE of the tokens is dense."""


def firing_section(evidence: Evidence) -> Section:
    """Histograms of latents' frequencies, for the canonical SAEs."""
    widths = sorted({sae.width for sae in evidence.canonical})
    lines = {width: DASHES[place % len(DASHES)] for place, width in enumerate(widths)}
    panels = [Panel(SITE_TITLES[kind], partial(_draw, evidence=evidence, kind=kind, lines=lines)) for kind in evidence.kinds]
    keys = [*evidence.layer_keys]
    if len(widths) > 1:
        keys += [LegendKey(f"width {width_label(width)}", line=line) for width, line in lines.items()]
    firing = [evidence.metrics[sae.folder]["firing"] for sae in evidence.canonical]
    shares = [its["dense_10_share_of_l0"] for its in firing if its["dense_10_share_of_l0"] is not None]
    dense = f"dense ones make {median(shares):.0%} of all firings" if shares else "none fires"
    return Section(
        anchor="firing",
        title="How often latents fire",
        basis=evidence.basis,
        says=(
            f"In the median canonical SAE {median(its['dead'] for its in firing):.1%} of the latents are dead and "
            f"{median(its['dense_10'] for its in firing):.1%} dense; {dense}."
        ),
        notes=(
            "Shares of latents in bins of equal length in the logarithm, dead ones left out. Dead: fires on none of the tokens; "
            "dense: on more than a tenth, to the right of the dashed line.",
        ),
        pictures=(Picture("firing", "How often latents fire", tuple(panels), tuple(keys)),),
    )


def _draw(axes: Axes, *, evidence: Evidence, kind: SiteKind, lines: dict) -> None:
    reach, peak = [], 0.0
    for sae in evidence.canonical:
        firing = evidence.metrics[sae.folder]["firing"]
        edges, counts = firing["log10_edges"], firing["counts"]
        shares = [count / sae.width for count in counts]
        reach += [edge for edge, count in zip(edges, counts, strict=False) if count]
        peak = max(peak, *shares)
        if sae.site == kind:
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            axes.plot(middles, shares, color=evidence.layers[sae.layer], linestyle=lines[sae.width], linewidth=1.2)
    axes.axvline(DENSE, color=NEUTRAL, linestyle=(0, (4, 2)), linewidth=0.9, zorder=1)
    axes.set_xlim(min(reach, default=-4.0) - 0.25, 0.0)
    axes.set_ylim(0, 1.06 * peak)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:g}"))
    axes.set_xlabel("Share of tokens on which a latent fires [1]")
    axes.set_ylabel("Share of the latents [1]")
