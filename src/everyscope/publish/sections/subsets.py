"""The canonical SAEs on other text."""

from functools import partial
from statistics import median
from typing import Any

from everyscope.base.progress import human_count
from everyscope.publish.drawing.pictures import Panel, Picture
from everyscope.publish.evidence import Evidence, kind_of, layer_of, present
from everyscope.publish.sections.dots import Dot, draw_dots, interval_of
from everyscope.publish.sections.section import ReportCell, ReportTable, Section
from everyscope.sites.names import SITE_TITLES, SiteKind

MEASURES = (("delta_loss", "Delta loss [nats/token]", True), ("fvu_usual", "FVU [1]", False))

Subset = dict[str, Any]


def subsets_section(evidence: Evidence) -> Section | None:
    """Delta loss and FVU on each named corpus; none without the slice."""
    subsets = evidence.slices.get("subsets", {}).get("subsets", [])
    rows = [row for subset in subsets for row in subset["rows"]]
    if not rows:
        return None
    narrow = {sae.folder for sae in evidence.chosen}
    pictures = []
    for name, label, is_logarithmic in MEASURES:
        shown = [row for row in rows if row[name] is not None and row["sae"] in narrow]
        values = [value for row in shown for value in (row[name], *(interval_of(row, name) or ())[1:])]
        panels = []
        for kind in present(rows):
            dots = _dots(evidence, subsets, kind, name, narrow)
            draw = partial(
                draw_dots,
                dots=dots,
                rows=[subset["name"].replace("_", " ") for subset in subsets],
                values=values,
                label=label,
                is_logarithmic=is_logarithmic,
            )
            panels.append(Panel(SITE_TITLES[kind], draw, (3.6, 0.9 + 0.5 * len(subsets))))
        title = f"{label.rpartition(' ')[0]} on each text"
        pictures.append(Picture(f"{name.removesuffix('_usual')}_by_text", title, tuple(panels), tuple(evidence.layer_keys)))
    return Section(
        anchor="texts",
        title="Across corpora",
        basis=evidence.basis_of(sum(subset["num_tokens"] for subset in subsets), "each text’s own held-out documents"),
        says=_says(subsets),
        notes=(
            "The canonical SAEs of the sites’ narrowest widths, trained on the suite’s own text. Bars are intervals over each "
            "text’s documents; one that leaves the axis goes to 0 or less.",
        ),
        pictures=tuple(pictures),
        table=_table(subsets),
    )


def _dots(evidence: Evidence, subsets: list[Subset], kind: SiteKind, name: str, saes: set[str]) -> list[Dot]:
    return [
        Dot(subset["name"].replace("_", " "), row[name], interval_of(row, name), evidence.layers[layer_of(row)])
        for subset in subsets
        for row in subset["rows"]
        if kind_of(row) == kind and row["sae"] in saes and row[name] is not None
    ]


def _middle(subset: Subset, name: str) -> float:
    return median(row[name] for row in subset["rows"] if row[name] is not None)


def _says(subsets: list[Subset]) -> str:
    return f"The median FVU runs {_span(subsets, 'fvu_usual')}, the median delta loss {_span(subsets, 'delta_loss')} nats/token."


def _span(subsets: list[Subset], name: str) -> str:
    """From the text with the lowest median to the one with the highest."""
    ordered = sorted(subsets, key=lambda subset: _middle(subset, name))
    ends = [f"{_middle(subset, name):.3f} on {subset['name'].replace('_', ' ')}" for subset in (ordered[0], ordered[-1])]
    return f"from {ends[0]} to {ends[1]}"


def _table(subsets: list[Subset]) -> ReportTable:
    columns = ("text", "what it is", "tokens", "loss of the model", "median delta loss", "median FVU")
    rows = []
    for subset in subsets:
        delta, fvu, loss = _middle(subset, "delta_loss"), _middle(subset, "fvu_usual"), subset.get("loss_clean")
        rows.append(
            (
                ReportCell(subset["name"].replace("_", " ")),
                ReportCell(subset.get("description") or ""),
                ReportCell(human_count(subset["num_tokens"]), subset["num_tokens"]),
                ReportCell("–" if loss is None else f"{loss:.3f}", loss),
                ReportCell(f"{delta:.3f}", delta),
                ReportCell(f"{fvu:.3f}", fvu),
            )
        )
    return ReportTable(columns, tuple(rows))
