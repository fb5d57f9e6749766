"""The scores of one evaluation as a table in the terminal, for SAEs that are not part of a run."""

from typing import Any

from rich import box
from rich.table import Table

from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.targets import load_targets
from everyscope.suite.layout import METRICS_FILE
from everyscope.suite.numbers import number_text
from everyscope.suite.records import RIVALS, beaten_by
from everyscope.suite.scores import read_metrics

NUMBERS = (
    "width",
    "l0",
    "fvu_usual",
    "fvu",
    "fvu_pca_usual",
    "delta_loss",
    "loss_recovered",
    "loss_recovered_reason",
    "dead_fraction",
    "massive",
)
"""Numbers that rows have, beside intervals and the baselines' FVUs."""
HEADS = ("SAE", "L0", "FVU", "plain\nFVU", "FVU of\nPCA", "delta\nloss", "recov.", "dead")
"""Short enough, with their numbers, for 80 columns beside names that take two lines."""


def score_rows(config: EvaluateConfig) -> list[dict[str, Any]]:
    """The numbers of every SAE that was evaluated, by its folder, with the bounds of its intervals."""
    rows = []
    for target in load_targets(config):
        metrics = read_metrics(target.scores / METRICS_FILE)
        rivals = {name: metrics["baselines"][name]["fvu_usual"] for name in RIVALS if name in metrics["baselines"]}
        numbers = {name: metrics[name] for name in NUMBERS}
        row = {"sae": target.place, **numbers, "baselines_fvu": rivals, "intervals": metrics["intervals"]}
        rows.append(row | {"data": metrics["data"], "num_tokens": metrics["num_tokens"]})
    return rows


def score_table(rows: list[dict[str, Any]]) -> Table:
    """`score_rows` for people: half of the interval's width beside a number, warnings below."""
    has_massive = any(row["massive"]["num_tokens"] for row in rows)
    heads = [head for head in HEADS if has_massive or head != "plain\nFVU"]
    table = Table(
        box=box.SIMPLE,
        padding=0,
        show_edge=False,
        title=f"Scores on {rows[0]['data']}: {rows[0]['num_tokens']:,} tokens",
        title_justify="left",
        caption="\n".join(["Delta loss in nats/token; ± half of the interval over documents", *warnings_of(rows)]),
        caption_justify="left",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "SAE" else "right", no_wrap=head != "SAE", overflow="fold")
    for row in rows:
        cells = _cells(row)
        table.add_row(*(cells[head] for head in heads))
    return table


def warnings_of(rows: list[dict[str, Any]]) -> list[str]:
    """What must be known of these numbers, a sentence each."""
    found = []
    most = max(rows, key=lambda row: row["massive"]["share_of_squares"] or 0)
    if most["massive"]["num_tokens"]:
        its = most["massive"]
        found.append(
            f"Massive tokens: at {_site(most)} {its['num_tokens']:,} tokens of norm above {its['norm_limit']:.4g} hold "
            f"{its['share_of_squares']:.0%} of the sum of squares; they stay as they are, and count in plain FVU alone"
        )
    beaten = {row["sae"]: rivals for row in rows if (rivals := beaten_by(row["fvu_usual"], row["baselines_fvu"]))}
    if beaten:
        rivals = [words for words in RIVALS.values() if any(words in its for its in beaten.values())]
        found.append(
            f"Undertrained: {len(beaten)} of {len(rows)} SAEs, marked *, leave more variance unexplained than "
            f"{' or '.join(rivals)} of their L0"
        )
    found += sorted({f"n/a: at {_site(row)} {row['loss_recovered_reason']}" for row in rows if row["loss_recovered_reason"]})
    return found


def _site(row: dict[str, Any]) -> str:
    return "/".join(row["sae"].split("/")[:2])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """The cells of one SAE, by head."""
    intervals, recovered = row["intervals"], row["loss_recovered"]
    mark = " *" if beaten_by(row["fvu_usual"], row["baselines_fvu"]) else ""
    cells = (
        f"{_site(row)}\n{row['sae'].removeprefix(_site(row) + '/')}",
        number_text(row["l0"], intervals["l0"]),
        number_text(row["fvu_usual"], intervals["fvu_usual"]) + mark,
        f"{row['fvu']:.3f}",
        f"{row['fvu_pca_usual']:.3f}",
        number_text(row["delta_loss"], intervals["delta_loss"]),
        "n/a" if recovered is None else f"{recovered:.3f}",
        f"{row['dead_fraction']:.1%}",
    )
    return dict(zip(HEADS, cells, strict=True))
