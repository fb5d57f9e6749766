"""The table of a suite: rows for JSON and pages, and a rendering for terminals."""

from typing import Any

from rich import box
from rich.table import Table

from everyscope.suite.layout import width_label
from everyscope.suite.records import SuiteIndex

COLUMNS = ("site", "layer", "width", "L0", "FVU", "FVU of PCA", "delta loss", "recovered", "dead", "dense")
"""Headings, in the order of a row's fields without `folder`."""


def suite_rows(index: SuiteIndex) -> list[dict[str, Any]]:
    """One flat object per SAE, in the suite's order: site, layer, width, headline numbers, folder."""
    return [
        {"site": sae.site, "layer": sae.layer, "width": sae.width, **sae.metrics.as_json(), "folder": sae.folder}
        for sae in index.saes
    ]


def row_texts(row: dict[str, Any]) -> list[str]:
    """The cells of one row as text, under COLUMNS."""
    recovered = row["loss_recovered"]
    return [
        row["site"],
        str(row["layer"]),
        width_label(row["width"]),
        f"{row['l0']:.1f}",
        f"{row['fvu']:.3f}",
        f"{row['fvu_pca']:.3f}",
        f"{row['delta_loss']:.3f}",
        "–" if recovered is None else f"{recovered:.3f}",
        f"{row['dead_fraction']:.1%}",
        f"{row['dense_fraction']:.1%}",
    ]


def suite_table(index: SuiteIndex) -> Table:
    """The suite for a terminal; delta loss in nats/token, fractions of 1."""
    measured = index.measured
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),  # with headings in two lines, so that 80 columns hold it
        title=f"{index.title}: {len(index.saes)} SAEs of {index.model}",
        caption=f"{measured.data}; {measured.num_tokens:,} tokens, {measured.mask}; delta loss in nats/token",
    )
    for name in COLUMNS:
        heading = name.replace("FVU of", "FVU of\n").replace("delta ", "delta\n")
        table.add_column(heading, justify="left" if name == "site" else "right", no_wrap=True)
    rows = suite_rows(index)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends_group = following is not None and (row["site"], row["layer"]) != (following["site"], following["layer"])
        table.add_row(*row_texts(row), end_section=ends_group)
    return table
