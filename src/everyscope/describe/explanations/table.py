"""explanations.parquet: a row for each latent that fires and each method that labelled it, with how well the label predicts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from everyscope.base.errors import DataError
from everyscope.base.tables import check_table, write_table
from everyscope.describe.explanations.scores import Score

EXPLANATIONS_FILE = "explanations.parquet"
FORMAT = 1
"""Raised when the columns mean something else."""
NUMBERS = (
    "detection",
    "detection_low",
    "detection_high",
    "detection_null",
    "fuzzing",
    "fuzzing_low",
    "fuzzing_high",
    "fuzzing_null",
)
SCHEMA = pyarrow.schema(
    [
        ("latent", pyarrow.int32()),
        ("label", pyarrow.string()),
        ("method", pyarrow.string()),
        ("kind", pyarrow.string()),
        *((name, pyarrow.float32()) for name in NUMBERS),
        ("num_scored", pyarrow.int32()),
    ]
)


@dataclass(frozen=True)
class Explanation:
    """The label of one latent."""

    latent: int
    label: str
    method: str
    """`offline statistics`, or the name of the language model that wrote the label."""
    kind: str
    """What the label is about (token, context, syntax, position, mixed, text); none: no rule; rare: too few firings."""
    detection: Score | None = None
    detection_null: float | None = None
    """Balanced accuracy of other latents' labels on the same windows [1]."""
    fuzzing: Score | None = None
    fuzzing_null: float | None = None
    num_scored: int = 0
    """Windows judged for detection [windows]."""

    def row(self) -> dict[str, Any]:
        """The columns of explanations.parquet; null where nothing could be scored."""
        row: dict[str, Any] = {name: getattr(self, name) for name in ("latent", "label", "method", "kind", "num_scored")}
        for name in ("detection", "fuzzing"):
            score: Score | None = getattr(self, name)
            row |= {name: score and score.value, f"{name}_low": score and score.low, f"{name}_high": score and score.high}
            row[f"{name}_null"] = getattr(self, f"{name}_null")
        return row


def write_explanations(path: Path, explanations: Sequence[Explanation], facts: dict[str, Any]) -> None:
    """Write them in order of latent, those of one latent in the order given.

    `facts` go into the file's metadata, under `everyscope`, as JSON.
    """
    rows = [one.row() for one in sorted(explanations, key=lambda one: one.latent)]
    table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
    table = table.replace_schema_metadata({"everyscope": json.dumps({"format": FORMAT, **facts}, allow_nan=False)})
    write_table(path, table, compression="zstd")


def explanation_facts(path: Path) -> dict[str, Any]:
    """What the metadata of an explanations.parquet says; {} where the file is missing or not to be read."""
    try:
        check_table(path, "it is explained again")
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        return json.loads(metadata[b"everyscope"])
    except (DataError, OSError, pyarrow.ArrowException, KeyError, ValueError):
        return {}
