"""What evaluations have cost: passes, seconds and tokens, beside the scores and never in them."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, write_json

COST_FILE = "cost.json"


@dataclass
class Cost:
    """Passes of the language model and what went with them."""

    clean: int = 0
    """Clean forward passes that feed all SAEs [batches]."""
    spliced: int = 0
    """Forward passes with an SAE's reconstruction, from its layer on [batches]."""
    baselines: int = 0
    """Forward passes for ablations and baselines, their own clean ones included [batches]."""
    calibration: int = 0
    """Forward passes over training documents, where there were no shards [batches]."""
    backwards: int = 0
    """Backward passes, on graphs of clean forward passes [batches]."""
    seconds: float = 0.0
    """Wall time of all passes and what is summed after them [s]."""
    tokens: int = 0
    """Positions of the clean forward passes [tokens]."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def as_json(self) -> dict[str, Any]:
        """As cost.json has it."""
        flat = asdict(self)
        forwards = {name: flat.pop(name) for name in ("clean", "spliced", "baselines", "calibration")}
        return {"forwards": forwards, **flat, "seconds": round(self.seconds, 3)}


def add_cost(scores: Path, cost: Cost) -> None:
    """Add to what cost.json says: the file holds what everything in the scores folder has cost."""
    write_json(scores / COST_FILE, (read_cost(scores) + cost).as_json())


def read_cost(scores: Path) -> Cost:
    """What cost.json says; nothing where there is none yet, or it is of another form."""
    try:
        value = read_json(scores / COST_FILE)
        return Cost(**value.pop("forwards"), **value)
    except (DataError, TypeError, KeyError, AttributeError):
        return Cost()
