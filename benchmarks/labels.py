"""How well the labels of a run's SAEs predict, a line for each SAE: share of latents with a rule, median detection, its null.

Intervals are of the median over latents, by 2,000 resamplings of the latents.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet

from everyscope.describe.explanations.offline import METHOD
from everyscope.describe.explanations.table import EXPLANATIONS_FILE
from everyscope.suite.latents import NO_RULE, RARE


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, whose stage explain is finished")
    found = sorted((parser.parse_args().run / "descriptions").rglob(EXPLANATIONS_FILE))
    tables = {file.parent: pyarrow.parquet.read_table(file).to_pylist() for file in found}
    for folder, rows in tables.items():
        print(f"{folder.parent.parent.name} {folder.parent.name} {folder.name}: {line_of(rows)}")
    print(f"all: {line_of([row for rows in tables.values() for row in rows])}")


def line_of(rows: Sequence[dict]) -> str:
    """Share, median and null of some offline labels."""
    alive = [row for row in rows if row["method"] == METHOD and row["kind"] != RARE]
    labelled = [row for row in alive if row["kind"] != NO_RULE]
    scores, nulls, fuzzing = (
        np.array([row[name] for row in labelled if row[name] is not None]) for name in ("detection", "detection_null", "fuzzing")
    )
    drawn = np.random.default_rng(0).integers(0, len(scores), (2000, len(scores)))
    low, high = np.percentile(np.median(scores[drawn], axis=1), [2.5, 97.5])
    return (
        f"{len(labelled):,} of {len(alive):,} labelled ({100 * len(labelled) / len(alive):.0f} %), "
        f"detection {np.median(scores):.3f} [{low:.3f}, {high:.3f}], null {np.median(nulls):.3f}, "
        f"fuzzing {np.median(fuzzing):.3f}"
    )


if __name__ == "__main__":
    main()
