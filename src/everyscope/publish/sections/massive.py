"""Massive activations: where they are, what they hold, and what plain FVU makes of them."""

from typing import Any

from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import ReportCell, ReportTable, Section, plural
from everyscope.suite.numbers import number_text

COLUMNS = (
    "site",
    "layer",
    "norm from",
    "tokens",
    "share of tokens",
    "share of squares",
    "L0 there",
    "FVU",
    "plain FVU",
)


def massive_section(evidence: Evidence) -> Section | None:
    """One row for each site that has massive activations; none where no site has."""
    saes = [sae for sae in evidence.chosen if sae.metrics.num_massive_tokens]
    if not saes:
        return None
    found: list[tuple[Any, dict[str, Any]]] = [(sae, evidence.metrics[sae.folder]["massive"]) for sae in saes]
    worst, most = max(found, key=lambda pair: pair[1]["share_of_squares"])
    rows = []
    for sae, its in found:
        metrics = sae.metrics
        rows.append(
            (
                ReportCell(sae.site, link=f"../{sae.folder}/"),
                ReportCell(str(sae.layer), sae.layer),
                ReportCell(f"{its['norm_limit']:.4g}", its["norm_limit"]),
                ReportCell(f"{its['num_tokens']:,}", its["num_tokens"]),
                ReportCell(f"{its['share_of_tokens']:.3%}", its["share_of_tokens"]),
                ReportCell(f"{its['share_of_squares']:.1%}", its["share_of_squares"]),
                ReportCell(f"{its['l0']:.1f}", its["l0"]),
                ReportCell(number_text(metrics.fvu_usual, metrics.intervals.fvu_usual), metrics.fvu_usual),
                ReportCell(f"{metrics.fvu:.3f}", metrics.fvu),
            )
        )
    return Section(
        anchor="massive",
        title="Massive activations",
        basis=evidence.basis,
        says=(
            f"At {worst.where}, {plural(most['num_tokens'], 'token')} of norm above {most['norm_limit']:.4g} "
            f"({most['max_norm']:g} times the median) hold {most['share_of_squares']:.0%} of the sum of squares: plain FVU, "
            f"{worst.metrics.fvu:.3f}, measures these; that of all other tokens is {worst.metrics.fvu_usual:.3f}."
        ),
        notes=(
            "Such tokens are attention sinks and separators. They keep their own activations when an SAE or a baseline is "
            "spliced in, and count in plain FVU alone. Squares are about zero; L0 there counts the latents that fire on "
            "such a token.",
        ),
        table=ReportTable(COLUMNS, tuple(rows)),
    )
