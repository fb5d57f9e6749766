"""What becomes of a narrow SAE's latents in a wider one, beside what chance alone would give."""

from functools import partial
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from everyscope.publish.drawing.palette import RELATIONS
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.evidence import Evidence, kind_of, layer_of, present
from everyscope.publish.sections.section import Section, plural, range_text
from everyscope.sites.names import SITE_TITLES, SiteKind
from everyscope.suite.layout import width_label

BAR, NULL_BAR = 0.44, 0.2
"""Heights of a pair's bar and of its null's [rows]."""
INKS = {"matched": "#ffffff", "split": "#1a2230", "new": "#1a2230"}
"""Text on a bar: not the page's ink, for bars are as light or dark on every page."""

Pair = dict[str, Any]


def splitting_section(evidence: Evidence) -> Section | None:
    """Shares of matched, split and new latents for each pair of widths; none without the slice."""
    pairs = evidence.slices.get("splitting", {}).get("pairs", [])
    if not pairs:
        return None
    widths = {sae.folder: sae.width for sae in evidence.index.saes}
    rows: dict[SiteKind, list[Pair]] = {kind: [pair for pair in pairs if kind_of(pair) == kind] for kind in present(pairs)}
    most = max(len(its) for its in rows.values())
    panels = [
        Panel(SITE_TITLES[kind], partial(_draw, pairs=its, widths=widths), (3.6, 1.1 + 0.42 * most)) for kind, its in rows.items()
    ]
    keys = [LegendKey(f"{name} latents", colour, is_filled=True) for name, colour in RELATIONS.items()]
    keys.append(LegendKey("thin bars: by chance"))
    related = [pair["matched"] + pair["split"] for pair in pairs]
    chance = [pair["null"]["matched"] + pair["null"]["split"] for pair in pairs]
    split = range_text([pair["split"] for pair in pairs], ".0%")
    threshold = range_text([pair["threshold"] for pair in pairs], ".2f")
    return Section(
        anchor="splitting",
        title="How latents split",
        basis="directions of the decoders, which take no tokens",
        says=(
            f"In {plural(len(pairs), 'pair')} of a narrow and a wider SAE, {median(related):.0%} of the wide one’s latents "
            f"(median) have a parent in the narrow one, where a random dictionary would have {median(chance):.0%}; {split} "
            "share theirs with others."
        ),
        notes=(
            "Shares of the wide SAE’s latents. Matched: the only one with its nearest narrow latent; split: one of several; "
            f"new: nearer to none than a cosine of {threshold}, which random directions seldom reach. slices/splitting/ has "
            "every latent.",
        ),
        pictures=(Picture("splitting", "Relation of a wide SAE's latents to a narrow one's", tuple(panels), tuple(keys)),),
    )


def _draw(axes: Axes, *, pairs: list[Pair], widths: dict[str, int]) -> None:
    labels = []
    for row, pair in enumerate(pairs):
        for shares, height, place, alpha in ((pair, BAR, row - 0.12, 1.0), (pair["null"], NULL_BAR, row + 0.27, 0.55)):
            start = 0.0
            for name, colour in RELATIONS.items():
                axes.barh(place, shares[name], height, left=start, color=colour, alpha=alpha, linewidth=0)
                if height == BAR and shares[name] >= 0.1:
                    axes.text(
                        start + shares[name] / 2,
                        place,
                        f"{shares[name]:.0%}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color=INKS[name],
                    )
                start += shares[name]
        labels.append(f"layer {layer_of(pair)}\n{_widths(pair, widths)}")
    axes.set_yticks(range(len(pairs)), labels, fontsize=7.5)
    axes.set_ylim(len(pairs) - 0.45, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Share of the wide SAE's latents [1]")


def _widths(pair: Pair, widths: dict[str, int]) -> str:
    known = [width_label(widths[pair[name]]) for name in ("narrow", "wide") if pair[name] in widths]
    return " → ".join(known)
