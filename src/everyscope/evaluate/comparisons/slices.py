"""A slice on disk: one JSON file that says what it was made from, so that it is made once."""

from pathlib import Path
from typing import Any

from everyscope.base.files import read_json, write_json

INPUTS = "inputs"
"""Key of the hash of all that decides a slice."""


def is_current(path: Path, inputs: str) -> bool:
    """True where the slice at `path` was made from exactly these inputs."""
    return path.exists() and read_json(path).get(INPUTS) == inputs


def write_slice(path: Path, inputs: str, content: dict[str, Any]) -> None:
    """Write a slice with the hash of its inputs. No dates: equal inputs give equal bytes."""
    write_json(path, content | {INPUTS: inputs})
