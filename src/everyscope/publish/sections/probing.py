"""How well a few latents predict a token's class."""

from functools import partial
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from everyscope.publish.drawing.palette import NEUTRAL, SITE_COLOURS, SITE_MARKERS
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.evidence import Evidence, kind_of, present
from everyscope.publish.sections.section import Section
from everyscope.sites.names import SITE_TITLES, SiteKind

LINES: dict[str, Any] = {"neurons": (0, (4, 2)), "dense": (0, (1, 1.6))}
"""Line styles of the baselines."""
COLUMNS = 4

Row = dict[str, Any]


def probing_section(evidence: Evidence) -> Section | None:
    """A panel for each label; none without the slice."""
    slice_ = evidence.slices.get("probing")
    if not slice_ or not slice_["rows"]:
        return None
    rows = slice_["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    kinds = present(rows)
    lowest = min(min(row["accuracy"], row["baseline"]["neurons"]) for row in rows)
    panels = [
        Panel(
            task.replace("_", " ").capitalize(),
            partial(_draw, rows=[row for row in rows if row["task"] == task], low=lowest),
            (2.9, 2.5),
        )
        for task in tasks
    ]
    keys = [LegendKey(SITE_TITLES[kind], SITE_COLOURS[kind], SITE_MARKERS[kind], "solid") for kind in kinds]
    keys += [LegendKey("k neurons", line=LINES["neurons"]), LegendKey("all neurons", line=LINES["dense"])]
    measured = evidence.basis_of(slice_.get("num_tokens"), slice_.get("data", evidence.index.measured.data))
    return Section(
        anchor="probing",
        title="Sparse probing",
        basis=f"{measured} · {slice_['seeds']} seeds",
        says=_says(rows),
        notes=(
            "Balanced accuracy of a linear probe on the k best latents, the median site of each kind, in a shade over its "
            "sites; always saying the same gives 0.5. Dashed: as many coordinates of the activation itself; dotted: all of "
            "them.",
        ),
        pictures=(Picture("probing", "Balanced accuracy of k-sparse probes", tuple(panels), tuple(keys), COLUMNS),),
    )


def _draw(axes: Axes, *, rows: list[Row], low: float) -> None:
    ks = sorted({row["k"] for row in rows})
    neurons = [median(row["baseline"]["neurons"] for row in rows if row["k"] == k) for k in ks]
    dense = median(row["baseline"]["dense"] for row in rows)
    axes.plot(ks, neurons, color=NEUTRAL, linestyle=LINES["neurons"], linewidth=1.1, zorder=1)
    axes.axhline(dense, color=NEUTRAL, linestyle=LINES["dense"], linewidth=1.1, zorder=1)
    for kind in present(rows):
        _draw_kind(axes, kind, [[row["accuracy"] for row in rows if kind_of(row) == kind and row["k"] == k] for k in ks], ks)
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(min(0.5, low) - 0.02, 1.01)
    axes.set_xlabel("k [latents]")
    axes.set_ylabel("Balanced accuracy [1]")


def _draw_kind(axes: Axes, kind: SiteKind, values: list[list[float]], ks: list[int]) -> None:
    known = [(k, its) for k, its in zip(ks, values, strict=True) if its]
    places = [k for k, _ in known]
    axes.fill_between(
        places, [min(its) for _, its in known], [max(its) for _, its in known], color=SITE_COLOURS[kind], alpha=0.12, linewidth=0
    )
    axes.plot(places, [median(its) for _, its in known], color=SITE_COLOURS[kind], marker=SITE_MARKERS[kind])


def _says(rows: list[Row]) -> str:
    k = min(row["k"] for row in rows)
    first = [row for row in rows if row["k"] == k]
    ahead = sum(row["accuracy"] > row["baseline"]["neurons"] for row in first)
    by_task = {task: max(row["accuracy"] for row in first if row["task"] == task) for task in {row["task"] for row in first}}
    best = min(by_task, key=lambda task: (-by_task[task], task))
    subject, verb, rivals = f"{k} latents tell", "they beat", f"{k} neurons"
    if k == 1:
        subject, verb, rivals = "a single latent tells", "it beats", "the best neuron"
    return (
        f"At its best site {subject} {best.replace('_', ' ')} with a balanced accuracy of {by_task[best]:.2f}; over all labels "
        f"and sites, {verb} {rivals} in {ahead} of {len(first)} cases."
    )
