"""suite/table.parquet: one row per SAE with every single number of its metrics.json (docs/reference/table.md)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from everyscope.base.files import whole_file
from everyscope.base.ids import IDENTITY
from everyscope.sae.files import WEIGHTS
from everyscope.suite.layout import TABLE_FILE
from everyscope.suite.records import SaeRecord

PREFIXES = {"baselines": "baseline_", "by_segment": "segment_"}
"""What columns of a nested object begin with; others begin with the object's name."""
OPTIONAL = ("by_segment", "uniformity")
"""Objects that may be null: they have columns if any SAE has them."""
WITHOUT = ("by_position", "evaluation", IDENTITY, WEIGHTS)
"""Keys whose values are no numbers of the SAE as a whole."""


def write_flat_table(suite: Path, records: Iterable[SaeRecord], metrics: dict[str, dict[str, Any]]) -> None:
    """Write the table; `metrics` are by folder. Equal metrics give equal bytes."""
    rows = [flat_row(record, metrics[record.folder]) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with whole_file(suite / TABLE_FILE) as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial, compression="zstd")


def flat_row(record: SaeRecord, metrics: dict[str, Any]) -> dict[str, Any]:
    """One SAE's row: what suite.json knows about it, then its metrics laid flat."""
    known = {"folder": record.folder, "name": record.name, "is_canonical": record.metrics.is_canonical}
    flat: dict[str, Any] = {**known, "training_tokens": record.num_tokens}
    for name, value in metrics.items():
        if name == "intervals":
            for measure, interval in value.items():
                flat[f"{measure}_low"], flat[f"{measure}_high"] = interval or (None, None)
        elif isinstance(value, dict):
            if name not in WITHOUT:
                flat |= _flat(value, PREFIXES.get(name, f"{name}_"))
        elif name not in (*WITHOUT, *OPTIONAL) and not isinstance(value, list):
            flat[name] = value
    return flat


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Numbers and words below `value`, whose names begin with `prefix`; lists are left out."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{name}_")
        elif not isinstance(item, list):
            found[f"{prefix}{name}"] = item
    return found


def _column(values: list[Any]) -> pyarrow.Array:
    """Whole numbers as int64, others as float64; words, and yes or no, as they are; absent is null."""
    known = [value for value in values if value is not None]
    if not known:
        return pyarrow.array(values, pyarrow.float64())
    kinds = {type(value) for value in known}
    if kinds <= {int, float} and kinds != {int}:
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    return pyarrow.array(values)
