"""Evaluating some of the SAEs again under another model, text or number format, with scores of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everyscope.evaluate.comparisons.scored import Scored
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.run import run as evaluate
from everyscope.suite.layout import METRICS_FILE
from everyscope.suite.scores import read_metrics


def evaluate_again(base: EvaluateConfig, chosen: Iterable[Scored], out: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """The metrics by name of `chosen` under `base` with `changes` to its fields; scores go below `out`, and are made once.

    Baselines and uniformity are left out: they belong to the suite's own evaluation. A change of model or text leaves the shards
    behind, for their rows are of another distribution. Raises as `evaluate.run` does.
    """
    chosen = list(chosen)
    if changes.keys() & {"model", "text"}:
        changes = {"shards": None} | changes
    cheap = {"baseline_sequences": 0, "uniformity_sequences": 0, "saes": tuple(one.name for one in chosen), "out": out}
    evaluate(base.model_copy(update=cheap | changes))
    return {one.name: read_metrics(out / one.name / METRICS_FILE) for one in chosen}


def row_of(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What slices tell of one SAE under one condition."""
    return {
        "site": name.rpartition("/")[0],
        "sae": name,
        "l0": metrics["l0"],
        "fvu": metrics["fvu"],
        "delta_loss": metrics["delta_loss"],
        "intervals": metrics["intervals"],
        "num_tokens": metrics["num_tokens"],
    }


def identities(variants: Iterable[dict[str, dict[str, Any]]]) -> list[str]:
    """The identities of all scores, in order: what a slice of them is made from."""
    return [metrics["evaluation"] for variant in variants for metrics in variant.values()]
