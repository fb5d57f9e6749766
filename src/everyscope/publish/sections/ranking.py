"""The canonical SAEs in order, with ties where intervals overlap."""

from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import ReportCell, ReportTable, Section
from everyscope.suite.layout import width_label
from everyscope.suite.numbers import interval_text
from everyscope.suite.ties import estimate, rank_spans

COLUMNS = ("place", "site", "layer", "width", "L0", "delta loss", "interval", "place by FVU", "FVU", "interval of FVU")


def ranking_section(evidence: Evidence) -> Section | None:
    """Places by delta loss and by FVU, as spans; none for a single SAE."""
    saes = evidence.canonical
    if len(saes) < 2:
        return None
    deltas = rank_spans([estimate(sae.metrics.delta_loss, sae.metrics.intervals.delta_loss) for sae in saes])
    fvus = rank_spans([estimate(sae.metrics.fvu_usual, sae.metrics.intervals.fvu_usual) for sae in saes])
    has_massive = any(sae.metrics.num_massive_tokens for sae in saes)
    rows = []
    for sae, delta, fvu in sorted(zip(saes, deltas, fvus, strict=True), key=lambda row: row[0].metrics.delta_loss):
        metrics = sae.metrics
        rows.append(
            (
                ReportCell(span_text(delta), delta[0] + delta[1] / 1000, is_soft=delta[0] != delta[1]),
                ReportCell(sae.site, link=f"../{sae.folder}/"),
                ReportCell(str(sae.layer), sae.layer),
                ReportCell(width_label(sae.width), sae.width),
                ReportCell(f"{metrics.l0:.1f}", metrics.l0),
                ReportCell(f"{metrics.delta_loss:.3f}", metrics.delta_loss),
                ReportCell(interval_text(metrics.intervals.delta_loss), metrics.delta_loss, is_soft=True),
                ReportCell(span_text(fvu), fvu[0] + fvu[1] / 1000, is_soft=fvu[0] != fvu[1]),
                ReportCell(f"{metrics.fvu_usual:.3f}", metrics.fvu_usual),
                ReportCell(interval_text(metrics.intervals.fvu_usual), metrics.fvu_usual, is_soft=True),
                *((ReportCell(f"{metrics.fvu:.3f}", metrics.fvu),) if has_massive else ()),
            )
        )
    certain = sum(first == last for first, last in deltas)
    return Section(
        anchor="ranking",
        title="Ranking (ties by confidence interval)",
        basis=evidence.basis,
        says=f"By delta loss, {certain} of {len(saes)} canonical SAEs have places of their own; {len(saes) - certain} tie.",
        notes=(
            "A place is the span that an SAE’s interval leaves it: behind all that are surely better, before all that are surely "
            f"worse; spans are grey. {evidence.interval_note.replace('Bars are', 'Intervals are')}",
        ),
        table=ReportTable((*COLUMNS, "plain FVU") if has_massive else COLUMNS, tuple(rows)),
    )


def span_text(span: tuple[int, int]) -> str:
    """A place, or the span of places."""
    first, last = span
    return str(first) if first == last else f"{first}–{last}"
