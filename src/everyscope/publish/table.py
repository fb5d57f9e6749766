"""The table of a suite: texts for pages, and a rendering for terminals.

Numbers stand with half their interval's width, rounded up. A canonical SAE is marked ●. What ties with an SAE of the same site
and like L0, so that nobody can say which is better, is marked = and greyed.
"""

import math
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from everyscope.suite.layout import width_label
from everyscope.suite.records import Interval, SaeRecord, SuiteIndex
from everyscope.suite.ties import estimate, rank_spans

COLUMNS = ("site", "layer", "width", "L0", "FVU", "FVU of PCA", "delta loss", "recovered", "dead", "dense")
"""Headings, in the order of a row's texts."""
HEADINGS = {"FVU of PCA": "FVU of\nPCA", "delta loss": "delta\nloss", "recovered": "reco-\nvered"}
"""Those that take two lines in a terminal."""
LIKE_L0 = 1.25
"""L0s that differ by no more than this factor count as alike [1]."""


@dataclass(frozen=True)
class Ties:
    """Whether an SAE's numbers tie with a rival's: one of the same site and like L0."""

    fvu: bool
    delta_loss: bool


def ties_of(index: SuiteIndex) -> dict[str, Ties]:
    """By folder: which numbers of an SAE tie with those of a rival."""
    found = {}
    for sae in index.saes:
        rivals = [one for one in index.saes if one.where == sae.where and _is_like(one.metrics.l0, sae.metrics.l0)]
        place = rivals.index(sae)
        fvu = rank_spans([estimate(one.metrics.fvu, one.metrics.intervals.fvu) for one in rivals])[place]
        delta = rank_spans([estimate(one.metrics.delta_loss, one.metrics.intervals.delta_loss) for one in rivals])[place]
        found[sae.folder] = Ties(fvu[0] != fvu[1], delta[0] != delta[1])
    return found


def _is_like(one: float, other: float) -> bool:
    return one <= LIKE_L0 * other and other <= LIKE_L0 * one


def number_text(value: float, interval: Interval | None, is_tied: bool = False) -> str:
    """As in 0.139±.004, with = before it where it ties."""
    text = f"{value:z.3f}" if abs(value) < 10 else f"{value:.1f}"
    if interval is not None:
        half = math.ceil((interval[1] - interval[0]) / 2 * 1000 - 1e-9) / 1000
        text += f"±{half:.3f}".replace("±0.", "±.") if abs(value) < 10 else f"±{half:.1f}"
    return f"= {text}" if is_tied else text


def interval_text(interval: Interval | None) -> str:
    """As in [0.135, 0.143]; a dash where there is none."""
    return "–" if interval is None else f"[{interval[0]:z.3f}, {interval[1]:z.3f}]"


def row_texts(sae: SaeRecord, ties: Ties) -> list[str]:
    """The cells of one SAE as text, under COLUMNS."""
    metrics, recovered = sae.metrics, sae.metrics.loss_recovered
    return [
        sae.site,
        str(sae.layer),
        width_label(sae.width),
        f"{'● ' if metrics.is_canonical else ''}{metrics.l0:.1f}",
        number_text(metrics.fvu, metrics.intervals.fvu, ties.fvu),
        f"{metrics.fvu_pca:.3f}",
        number_text(metrics.delta_loss, metrics.intervals.delta_loss, ties.delta_loss),
        "–" if recovered is None else f"{recovered:.3f}",
        f"{metrics.dead_fraction:.1%}",
        f"{metrics.dense_fraction:.1%}",
    ]


def row_keys(sae: SaeRecord) -> list[float | str | None]:
    """What the cells of one SAE are sorted by, under COLUMNS."""
    metrics = sae.metrics
    numbers = (metrics.l0, metrics.fvu, metrics.fvu_pca, metrics.delta_loss, metrics.loss_recovered)
    return [sae.site, sae.layer, sae.width, *numbers, metrics.dead_fraction, metrics.dense_fraction]


def suite_table(index: SuiteIndex) -> Table:
    """The suite for a terminal; delta loss in nats/token, fractions of 1."""
    measured = index.measured
    table = Table(
        box=box.SIMPLE,
        padding=0,  # columns stand a space apart by the box alone, so that 80 hold the table
        show_edge=False,
        title=f"{index.title}: {len(index.saes)} SAEs of {index.model}",
        caption=(
            f"{measured.data}; {measured.num_tokens:,} tokens, {measured.mask}; delta loss in nats/token; ± half of the "
            f"{measured.interval_level:.0%} interval over {measured.num_documents:,} documents; ● canonical; = ties with an "
            "SAE of the same site and like L0"
        ),
    )
    for name in COLUMNS:
        table.add_column(HEADINGS.get(name, name), justify="left" if name == "site" else "right", no_wrap=True)
    ties = ties_of(index)
    for sae, following in zip(index.saes, [*index.saes[1:], None], strict=True):
        table.add_row(*_cells(sae, ties[sae.folder]), end_section=following is not None and sae.where != following.where)
    return table


def _cells(sae: SaeRecord, ties: Ties) -> list[Text]:
    """The texts of one SAE with their styles: ties greyed, canonical L0s bold."""
    styles = {"FVU": "dim" if ties.fvu else "", "delta loss": "dim" if ties.delta_loss else ""}
    styles["L0"] = "bold" if sae.metrics.is_canonical else ""
    return [Text(text, style=styles.get(name, "")) for name, text in zip(COLUMNS, row_texts(sae, ties), strict=True)]
