"""A slice on disk: one JSON file that says what it was made from, so that it is made once."""

from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed, write_sealed
from everyscope.base.progress import say

INPUTS = "inputs"
"""Key of the hash of a slice's inputs."""


def is_current(path: Path, inputs: str) -> bool:
    """True where the slice at `path` was made from exactly these inputs."""
    if not path.exists():
        return False
    try:
        return read_slice(path).get(INPUTS) == inputs
    except DataError as error:
        say(f"  {error}")
        return False


def read_slice(path: Path) -> dict[str, Any]:
    """What `write_slice` wrote; DamagedData where it was changed since."""
    return read_sealed(path, "it is measured again")


def left_out(path: Path, reason: str) -> Path:
    """Say why a slice cannot be made of these SAEs, and remove an earlier one: the run continues without it."""
    say(f"  left out: {reason}")
    path.unlink(missing_ok=True)
    return path


def write_slice(path: Path, inputs: str, content: dict[str, Any]) -> None:
    """Write a slice with the hash of its inputs. No dates: equal inputs give equal bytes."""
    write_sealed(path, content | {INPUTS: inputs})
