"""What the evaluation has cost."""

from everyscope.base.progress import human_count
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.section import ReportCell, ReportTable, Section

MEANINGS = {
    "clean": "the untouched model, which feed the statistics of every SAE",
    "spliced": "with an SAE’s reconstruction, from its layer on",
    "baselines": "ablations and baselines",
    "calibration": "training text, for means, principal components and thresholds",
}


def cost_section(evidence: Evidence) -> Section | None:
    """Passes by what they were for; none where the evaluation kept no count. Seconds stay in cost.json: they vary."""
    cost = evidence.cost
    if not cost:
        return None
    forwards: dict[str, int] = {name: count for name, count in cost["forwards"].items() if count}
    rows = [
        (ReportCell("forward"), ReportCell(MEANINGS.get(name, name)), ReportCell(f"{count:,}", count))
        for name, count in forwards.items()
    ]
    if cost.get("backwards"):
        rows.append(
            (
                ReportCell("backward"),
                ReportCell("on the clean passes, for uniformity"),
                ReportCell(f"{cost['backwards']:,}", cost["backwards"]),
            )
        )
    clean, total = forwards.get("clean", 0), sum(forwards.values())
    return Section(
        anchor="cost",
        title="Compute cost",
        basis=f"{human_count(cost['tokens'])} tokens through the untouched model" if cost.get("tokens") else evidence.basis,
        says=(
            f"{total:,} forward passes measured {len(evidence.index.saes)} SAEs, {clean:,} of them with the untouched model; "
            "most others begin at an SAE’s layer."
        ),
        notes=("Passes are batches. The comparisons between texts, number formats and models keep counts of their own.",),
        table=ReportTable(("pass", "of", "batches"), tuple(rows)),
    )
