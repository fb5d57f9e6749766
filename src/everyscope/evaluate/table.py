"""The scores of one evaluation as a table in the terminal, for SAEs that are not part of a run."""

from typing import Any

from rich import box
from rich.table import Table

from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.targets import load_targets
from everyscope.suite.layout import METRICS_FILE
from everyscope.suite.scores import read_metrics

COLUMNS = {"width": "d", "l0": ".1f", "fvu": ".4f", "delta_loss": ".4f", "loss_recovered": ".4f", "dead_fraction": ".1%"}
"""Numbers shown, and how."""
WITH_INTERVAL = ("l0", "fvu", "delta_loss")
"""Those of them that are shown with the bounds of their interval."""


def score_rows(config: EvaluateConfig) -> list[dict[str, Any]]:
    """The numbers of every SAE that was evaluated, by its folder, with the bounds of its intervals."""
    rows = []
    for target in load_targets(config):
        metrics = read_metrics(target.scores / METRICS_FILE)
        rows.append({"sae": target.place, **{name: metrics[name] for name in COLUMNS}, "intervals": metrics["intervals"]})
    return rows


def score_table(rows: list[dict[str, Any]]) -> Table:
    """`score_rows` for people."""
    table = Table(box=box.SIMPLE, title="Scores on held-out text", title_justify="left")
    table.add_column("SAE", overflow="fold")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["sae"], *(_cell(row, name) for name in COLUMNS))
    return table


def _cell(row: dict[str, Any], name: str) -> str:
    value, form = row[name], COLUMNS[name]
    if value is None:
        return "–"
    bounds = row["intervals"].get(name) if name in WITH_INTERVAL else None
    return format(value, form) + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")
