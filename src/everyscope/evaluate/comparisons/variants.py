"""Evaluating some of the SAEs again under another model, text or number format, with scores of their own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from everyscope.base.progress import meter
from everyscope.evaluate.comparisons.scored import Scored
from everyscope.evaluate.config import LEAST_CALIBRATION_TOKENS, EvaluateConfig
from everyscope.evaluate.run import run as evaluate
from everyscope.evaluate.work import UNIT, Work, planned_blocks
from everyscope.suite.layout import METRICS_FILE
from everyscope.suite.scores import read_metrics

Key = TypeVar("Key")
Scores = dict[str, dict[str, Any]]
"""metrics.json of some SAEs, by their names."""


@dataclass(frozen=True)
class Variant:
    """Some SAEs of an evaluation, and a condition to score them under."""

    chosen: Sequence[Scored]
    out: Path
    """Where the scores go."""
    changes: Mapping[str, Any]
    """Fields of the evaluation that differ."""


def evaluate_variants(base: EvaluateConfig, variants: Mapping[Key, Variant], title: str) -> dict[Key, Scores]:
    """The metrics of each variant by its key and then by SAE, made once, under one bar called `title`.

    Raises as `evaluate.run` does.
    """
    configs = {key: variant_config(base, variant) for key, variant in variants.items()}
    planned = {key: planned_blocks(config, [len(variants[key].chosen)]) for key, config in configs.items()}
    found = {}
    with meter(title, sum(planned.values()), UNIT) as progress:
        for key, config in configs.items():
            work = Work(progress, planned[key])
            evaluate(config, work)
            work.finish()
            found[key] = {one.name: read_metrics(config.out / one.name / METRICS_FILE) for one in variants[key].chosen}
    return found


def variant_config(base: EvaluateConfig, variant: Variant) -> EvaluateConfig:
    """The evaluation of a variant.

    Baselines and uniformity are left out: they belong to the suite's own evaluation. A change of model or text leaves the shards
    behind, for their rows are of another distribution, and reads only as much training text as norms need.
    """
    saes = tuple(one.name for one in variant.chosen)
    changes: dict[str, Any] = {"baseline_sequences": 0, "uniformity_sequences": 0, "saes": saes, "out": variant.out}
    if variant.changes.keys() & {"model", "text"}:
        few = base.calibration_sequences or -(-LEAST_CALIBRATION_TOKENS // base.text.context)
        changes |= {"shards": None, "calibration_sequences": few}
    return base.model_copy(update=changes | dict(variant.changes))


def row_of(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """The slices' results for one SAE under one condition."""
    return {
        "site": name.rpartition("/")[0],
        "sae": name,
        "l0": metrics["l0"],
        "fvu": metrics["fvu"],
        "fvu_usual": metrics["fvu_usual"],
        "delta_loss": metrics["delta_loss"],
        "intervals": metrics["intervals"],
        "num_tokens": metrics["num_tokens"],
    }


def identities(variants: Iterable[dict[str, dict[str, Any]]]) -> list[str]:
    """The identities of all scores, in order: what a slice of them is made from."""
    return [metrics["evaluation"] for variant in variants for metrics in variant.values()]
