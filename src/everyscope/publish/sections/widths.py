"""What a wider SAE gains at the same sparsity."""

from functools import partial
from typing import Any

from matplotlib.axes import Axes

from everyscope.publish.drawing.pictures import Panel, Picture
from everyscope.publish.drawing.scales import scale_value
from everyscope.publish.evidence import Evidence, kind_of, layer_of, present
from everyscope.publish.sections.section import Section, plural
from everyscope.sites.names import SITE_TITLES, SiteKind
from everyscope.suite.layout import width_label

MEASURES = (("delta_loss_at_l0", "delta_loss", "Delta loss [nats/token]", True), ("fvu_usual_at_l0", "fvu", "FVU [1]", False))

Group = dict[str, Any]


def widths_section(evidence: Evidence) -> Section | None:
    """Metrics by width at the middle of each site's common L0s; none without the slice."""
    groups = middle_groups(evidence.slices.get("widths", {}).get("groups", []))
    if not groups:
        return None
    kinds = present(groups)
    pictures = []
    for key, short, label, is_logarithmic in MEASURES:
        panels = [
            Panel(
                SITE_TITLES[kind],
                partial(_draw, evidence=evidence, groups=groups, kind=kind, key=key, label=label, is_logarithmic=is_logarithmic),
            )
            for kind in kinds
        ]
        title = f"{label.rpartition(' ')[0]} against width, at one L0 for each site"
        pictures.append(Picture(f"{short}_against_width", title, tuple(panels), tuple(evidence.layer_keys)))
    l0s = sorted(group["l0"] for group in groups)
    return Section(
        anchor="widths",
        title="Wider, at the same sparsity",
        basis=evidence.basis,
        says=_says(groups),
        notes=(
            f"Each site’s curves over L0 are read off, in log L0, at one L0 that all its widths reach: {l0s[0]:.0f} to "
            f"{l0s[-1]:.0f} latents, the middle of those in slices/widths.json.",
        ),
        pictures=tuple(pictures),
    )


def middle_groups(groups: list[Group]) -> list[Group]:
    """For each site the group of middle L0."""
    found = []
    for site in dict.fromkeys(group["site"] for group in groups):
        here = sorted((group for group in groups if group["site"] == site), key=lambda group: group["l0"])
        found.append(here[(len(here) - 1) // 2])
    return found


def _known(group: Group, key: str) -> list[tuple[int, float]]:
    """Widths and values of a group, narrow to wide."""
    return sorted((point["width"], point[key]) for point in group["points"] if point[key] is not None)


def _draw(
    axes: Axes, *, evidence: Evidence, groups: list[Group], kind: SiteKind, key: str, label: str, is_logarithmic: bool
) -> None:
    for group in groups:
        if kind_of(group) == kind and (known := _known(group, key)):
            widths, values = zip(*known, strict=True)
            axes.plot(widths, values, color=evidence.layers[layer_of(group)], marker="o")
    everywhere = sorted({width for group in groups for width, _ in _known(group, key)})
    axes.set_xscale("log", base=2)
    if everywhere:
        axes.set_xlim(everywhere[0] / 1.3, everywhere[-1] * 1.3)
    axes.set_xticks(everywhere, [width_label(width) for width in everywhere])
    axes.set_xticks([], minor=True)
    scale_value(axes, [value for group in groups for _, value in _known(group, key)], is_logarithmic=is_logarithmic)
    axes.set_xlabel("Width [latents]")
    axes.set_ylabel(label)


def _says(groups: list[Group]) -> str:
    """How many sites the widest serves better than the narrowest."""
    parts = []
    for key, name in (("fvu_usual_at_l0", "FVU"), ("delta_loss_at_l0", "delta loss")):
        ends = [(known[0][1], known[-1][1]) for group in groups if len(known := _known(group, key)) > 1]
        gains = sum(wide < narrow for narrow, wide in ends)
        parts.append(f"the {name} at {gains} of {plural(len(ends), 'site')}")
    return f"At equal L0, the widest SAE lowers {parts[0]} and {parts[1]} below the narrowest one’s."
