"""The two pages of a suite, rendered from its index: the model card and the report."""

from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.markers import MarkerStyle

from everyscope.base.files import write_text
from everyscope.base.progress import human_count
from everyscope.publish.figures import (
    DELTA_LOSS,
    FVU,
    RECOVERED,
    SITE_TITLES,
    heat_png,
    heat_svg,
    kinds_of,
    layer_colours,
    middle_saes,
    panel_svg,
    panels_png,
    width_markers,
)
from everyscope.publish.table import COLUMNS, row_texts, suite_rows
from everyscope.suite.layout import CARD_FILE, REPORT_FILE, width_label
from everyscope.suite.records import SuiteIndex

TEMPLATES = Path(__file__).parent / "templates"
PICTURES = (
    (FVU, "Fraction of variance unexplained against L0"),
    (DELTA_LOSS, "Rise of the language model's loss against L0"),
)
HEAT_PICTURES = ((FVU, "FVU at the middle sparsity"), (RECOVERED, "Loss recovered at the middle sparsity"))


def write_report(suite: Path, index: SuiteIndex) -> None:
    """report/index.html, one file that needs nothing else, and the same figures as PNG beside it."""
    folder = (suite / REPORT_FILE).parent
    note = f"{human_count(index.measured.num_tokens)} tokens, {index.measured.data}; {index.measured.mask}"
    for measure, title in PICTURES:
        panels_png(folder / f"{measure.file}.png", index, measure, f"{title}\n{note}")
    for measure, title in HEAT_PICTURES:
        heat_png(folder / f"{measure.file}_by_site.png", index, measure, "\n".join([title, *wrap(note, 56)]))
    write_text(suite / REPORT_FILE, _render("report.html.j2", autoescape=True, **_report_context(index)))


def write_card(suite: Path, index: SuiteIndex, license_name: str | None) -> None:
    """README.md: the model card, with the suite's table."""
    rows = [row_texts(row) for row in suite_rows(index)]
    context = {
        "index": index,
        "columns": COLUMNS,
        "rows": rows,
        "license": license_name,
        "example": index.saes[len(index.saes) // 2],
    }
    write_text(suite / CARD_FILE, _render("card.md.j2", autoescape=False, **context))


def report_files() -> list[str]:
    """The paths below a suite that `write_report` writes."""
    folder = Path(REPORT_FILE).parent
    names = [f"{measure.file}.png" for measure, _ in PICTURES] + [f"{measure.file}_by_site.png" for measure, _ in HEAT_PICTURES]
    return [REPORT_FILE, *((folder / name).as_posix() for name in names)]


def _render(template: str, *, autoescape: bool, **context: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = human_count
    return environment.get_template(template).render(context)


def _report_context(index: SuiteIndex) -> dict[str, Any]:
    rows = suite_rows(index)
    panels = [
        {
            "title": title,
            "has_baseline": measure.baseline is not None,
            "panels": [{"title": SITE_TITLES[kind], "svg": panel_svg(index, measure, kind)} for kind in kinds_of(index)],
        }
        for measure, title in PICTURES
    ]
    return {
        "index": index,
        "headlines": headlines(index),
        "figures": panels,
        "heats": [{"title": title, "svg": heat_svg(index, measure)} for measure, title in HEAT_PICTURES],
        "layers": list(layer_colours(index).items()),
        "widths": [(width_label(width), marker_svg(marker)) for width, marker in width_markers(index).items()],
        "columns": COLUMNS,
        "rows": [{"folder": row["folder"], "cells": _cells(row)} for row in rows],
    }


def _cells(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Text and sorting key of each cell."""
    keys = [value for name, value in row.items() if name != "folder"]
    return [(text, -1 if key is None else key) for text, key in zip(row_texts(row), keys, strict=True)]


def headlines(index: SuiteIndex) -> list[tuple[str, str]]:
    """The few numbers at the top of the report: value, and what it is."""
    middle = list(middle_saes(index).values())
    recovered = [sae.metrics.loss_recovered for sae in middle if sae.metrics.loss_recovered is not None]
    beats = sum(sae.metrics.fvu < sae.metrics.fvu_pca for sae in index.saes)
    found = [
        (str(len(index.saes)), f"SAEs at {len(middle)} sites"),
        (f"{median(sae.metrics.fvu for sae in middle):.3f}", "median FVU, middle sparsity"),
        (f"{median(sae.metrics.delta_loss for sae in middle):.3f}", "median delta loss there [nats/token]"),
    ]
    if recovered:
        found.append((f"{median(recovered):.3f}", f"median loss recovered there (lowest {min(recovered):.3f})"))
    narrow = min(sae.width for sae in index.saes)
    dead = median(sae.metrics.dead_fraction for sae in index.saes if sae.width == narrow)
    return [
        *found,
        (f"{dead:.1%}", f"median share of dead latents, width {width_label(narrow)}"),
        (f"{beats}/{len(index.saes)}", "SAEs explain more than PCA with L0 components"),
    ]


def marker_svg(marker: str) -> str:
    """A width's marker as a little SVG for the legend."""
    style = MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform())
    points = np.concatenate([np.asarray(polygon) for polygon in outline.to_polygons()])
    coordinates = " ".join(f"{6 + 9 * x:.2f},{6 - 9 * y:.2f}" for x, y in points)
    return f'<svg class="mark" viewBox="0 0 12 12"><polygon points="{coordinates}"/></svg>'
