"""What shorter number formats change."""

from functools import partial
from statistics import median
from typing import Any

from everyscope.publish.drawing.palette import SITE_COLOURS, SITE_MARKERS
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.evidence import Evidence, kind_of, present
from everyscope.publish.sections.dots import Dot, draw_dots
from everyscope.publish.sections.section import Section, plural
from everyscope.sites.names import SITE_TITLES

EXACT = ("float32", "float32")
MEASURES = (
    ("fvu_usual", "Change of FVU [1]"),
    ("delta_loss", "Change of delta loss [nats/token]"),
    ("l0", "Change of L0 [latents]"),
)

Row = dict[str, Any]


def precision_section(evidence: Evidence) -> Section | None:
    """Changes against float32 throughout; none without the slice, or where float32 is not in it."""
    rows = evidence.slices.get("precision", {}).get("rows", [])
    exact = {row["sae"]: row for row in rows if formats(row) == EXACT}
    others = [row for row in rows if formats(row) != EXACT and row["sae"] in exact]
    if not others:
        return None
    conditions = list(dict.fromkeys(map(condition, others)))
    panels = []
    for name, label in MEASURES:
        dots = [
            Dot(condition(row), row[name] - exact[row["sae"]][name], None, SITE_COLOURS[kind_of(row)], SITE_MARKERS[kind_of(row)])
            for row in sorted(others, key=lambda row: row["site"])
        ]
        draw = partial(
            draw_dots, dots=dots, rows=conditions, values=[dot.value for dot in dots], label=label, is_logarithmic=False
        )
        panels.append(Panel(label.rpartition(" ")[0], draw, (3.6, 1.0 + 0.5 * len(conditions))))
    keys = [LegendKey(SITE_TITLES[kind], SITE_COLOURS[kind], SITE_MARKERS[kind]) for kind in present(others)]
    return Section(
        anchor="precision",
        title="Reduced precision",
        basis=evidence.basis_of(rows[0].get("num_tokens"), evidence.index.measured.data),
        says=_says(others, exact),
        notes=("Changes against float32 for both, on the same tokens: one canonical SAE for each site.",),
        pictures=(Picture("precision", "What shorter number formats change", tuple(panels), tuple(keys)),),
    )


def formats(row: Row) -> tuple[str, str]:
    """Number formats of the SAE and of the language model."""
    return row["sae_dtype"], row["model_dtype"]


def condition(row: Row) -> str:
    """The same in words."""
    return f"SAE {row['sae_dtype']}\nmodel {row['model_dtype']}"


def _says(rows: list[Row], exact: dict[str, Row]) -> str:
    parts = []
    for words in dict.fromkeys(map(condition, rows)):
        changes = [abs(row["fvu_usual"] / exact[row["sae"]]["fvu_usual"] - 1) for row in rows if condition(row) == words]
        parts.append(f"{median(changes):.2%} for {words.replace(chr(10), ', ')}")
    return f"The FVU changes by, in the median over {plural(len(exact), 'site')}: {'; '.join(parts)}."
