"""The scores of one SAE on disk: metrics.json, which evaluating writes, and describing and publishing read. Torch-free."""

from pathlib import Path
from typing import Any

from everyscope.base.files import read_sealed

REMEDY = "delete its folder and run `everyscope evaluate` again"


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics.json of a scores folder; DamagedData where it was changed since it was written, DataError where it is missing."""
    return read_sealed(path, REMEDY)
