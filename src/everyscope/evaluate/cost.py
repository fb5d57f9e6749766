"""What evaluations have cost: passes, seconds and tokens, beside the scores and never in them."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed, write_sealed

COST_FILE, ENTRIES = "cost.json", "entries"
REMEDY = "delete it, or the scores with it, and run `everyscope evaluate` again"


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


def keep_cost(scores: Path, key: str, cost: Cost) -> None:
    """Enter what a piece of work has cost into cost.json, once: work that `key` names and that is in it already changes nothing.

    To be called before the work's own results are written: if stopped in between, the work is redone and entered once.
    """
    entries = read_costs(scores)
    if key not in entries:
        write_costs(scores, entries | {key: cost})


def read_costs(scores: Path) -> dict[str, Cost]:
    """What each piece of work has cost, by its key; DamagedData where cost.json was changed."""
    if not (scores / COST_FILE).exists():
        return {}
    costs = read_sealed(scores / COST_FILE, REMEDY)
    try:
        return {key: Cost(**its) for key, its in costs[ENTRIES].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{scores / COST_FILE}: is of another version; {REMEDY}") from error


def write_costs(scores: Path, entries: dict[str, Cost]) -> None:
    """Write cost.json: the sum of all entries, then each."""
    total = sum(entries.values(), Cost())
    write_sealed(scores / COST_FILE, total.as_json() | {ENTRIES: {key: asdict(cost) for key, cost in sorted(entries.items())}})
