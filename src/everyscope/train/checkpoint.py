"""A bank's state on disk: one safetensors file, replaced whole, from which training goes on to the same bits."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from everyscope.base.errors import DataError
from everyscope.base.tensors import write_tensors
from everyscope.train.bank import Bank


@dataclass(frozen=True)
class Place:
    """Where a run stands, besides its tensors."""

    num_steps_done: int
    log_bytes: int
    """Length of metrics.jsonl at that moment [bytes]; what a killed run wrote behind it is cut off."""


def save_checkpoint(path: Path, bank: Bank, run_id: str, log_bytes: int) -> None:
    """Write the bank's tensors and its place; `run_id` names the run that may go on from here."""
    metadata = {"run_id": run_id, "num_steps_done": str(bank.num_steps_done), "log_bytes": str(log_bytes)}
    write_tensors(path, bank.tensors(), metadata)


def load_checkpoint(path: Path, bank: Bank, run_id: str) -> Place:
    """Restore the bank from `path`, or leave it at step 0 where there is no file; DataError for another run's file."""
    if not path.exists():
        return Place(0, 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["run_id"] != run_id:
            raise DataError(
                f"{path}: belongs to another run (other shards or SAEs); delete it to train anew, or choose another --out"
            )
        bank.restore({name: file.get_tensor(name) for name in file.keys()}, int(metadata["num_steps_done"]))  # noqa: SIM118
    return Place(bank.num_steps_done, int(metadata["log_bytes"]))
