"""A bank's state on disk, from which training goes on to the same bits; on as many ranks as one likes.

One process writes one safetensors file, replaced whole. Several write a folder beside it: a file for each shard of the latents,
and then a manifest that names them. What no manifest names was never finished, and the checkpoint before stands until then.
Whoever loads takes its own latents out of whatever files there are.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import make_folder, read_json, write_json
from everyscope.base.tensors import write_tensors
from everyscope.train.bank import Bank

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Place:
    """Where a run stands, besides its tensors."""

    num_steps_done: int
    log_bytes: int
    """Length of metrics.jsonl at that moment [bytes]; what a killed run wrote behind it is cut off."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    run_id: str
    place: Place
    files: tuple[Path, ...]
    """In the order of the latents that they hold."""


class Parts:
    """The tensors in a checkpoint's files, as if they were in one."""

    def __init__(self, files: list[Any]) -> None:
        """Made by `opened`."""
        self._files = files

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._files[0].keys()

    def read(self, name: str, axis: int | None, latents: range) -> Tensor:
        """The stretch `latents` along `axis` of a tensor that is cut there, or all of one that is not (axis None)."""
        if axis is None:
            return self._files[0].get_tensor(name)
        pieces, start = [], 0
        for file in self._files:
            part = file.get_slice(name)
            stop = start + part.get_shape()[axis]
            first, last = max(latents.start, start) - start, min(latents.stop, stop) - start
            if first < last:
                pieces.append(part[first:last] if axis == 0 else part[:, first:last])
            start = stop
        if start < latents.stop:
            raise DamagedData(f"{name} has {start} latents in the checkpoint, expected {latents.stop}; delete it to train anew")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


@contextmanager
def opened(files: tuple[Path, ...]) -> Iterator[Parts]:
    """The tensors in these files, read as they are asked for; DamagedData where one is missing or no safetensors file."""
    with ExitStack() as stack:
        try:
            parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
        except (OSError, SafetensorError) as error:
            raise DamagedData(f"{files[0].parent}: the checkpoint cannot be read ({error}); delete it to train anew") from error
        yield Parts(parts)


def folder_of_ranks(path: Path) -> Path:
    """Where several ranks write the checkpoint that one process would write to `path`."""
    return path.with_suffix(".ranks")


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The one at `path`, by one process or by several: that of more steps, for a kill may leave both."""
    found = []
    if path.exists():
        with safe_open(path, "pt") as file:
            said = file.metadata()
        found.append(Checkpoint(said["run_id"], Place(int(said["num_steps_done"]), int(said["log_bytes"])), (path,)))
    folder = folder_of_ranks(path)
    if (folder / MANIFEST).exists():
        said = read_json(folder / MANIFEST)
        files = tuple(folder / name for name in said["files"])
        found.append(Checkpoint(said["run_id"], Place(said["num_steps_done"], said["log_bytes"]), files))
    return max(found, key=lambda checkpoint: checkpoint.place.num_steps_done, default=None)


def save_checkpoint(path: Path, bank: Bank, run_id: str, log_bytes: int) -> None:
    """Write the bank's tensors and its place; `run_id` names the run that may go on from here.

    Of several ranks all call this; the first one's `log_bytes` counts, and only it says that the checkpoint is whole.
    """
    if bank.collective.mesh.ranks > 1:
        _save_shard(path, bank, run_id, log_bytes)
        return
    metadata = {"run_id": run_id, "num_steps_done": str(bank.num_steps_done), "log_bytes": str(log_bytes)}
    write_tensors(path, bank.tensors(), metadata)
    shutil.rmtree(folder_of_ranks(path), ignore_errors=True)


def _save_shard(path: Path, bank: Bank, run_id: str, log_bytes: int) -> None:
    """Every shard's file, by its first replica (all hold the same bits); then the manifest, then what it replaces goes."""
    mesh, folder = bank.collective.mesh, make_folder(folder_of_ranks(path))
    names = [f"step_{bank.num_steps_done}_shard_{shard}_of_{mesh.shards}.safetensors" for shard in range(mesh.shards)]
    if mesh.replica == 0:
        write_tensors(folder / names[mesh.shard], bank.tensors())
    bank.collective.barrier()
    if mesh.rank == 0:
        said = {"run_id": run_id, "num_steps_done": bank.num_steps_done, "log_bytes": log_bytes, "files": names}
        write_json(folder / MANIFEST, said)
        for old in folder.iterdir():
            if old.name not in (*names, MANIFEST):
                old.unlink()
        path.unlink(missing_ok=True)
    bank.collective.barrier()  # nobody goes on from, or writes beside, what is being taken away


def load_checkpoint(path: Path, bank: Bank, run_id: str) -> Place:
    """Restore the bank from the checkpoint at `path`, or leave it at step 0 where there is none.

    DataError for another run's, DamagedData for one that cannot be read.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return Place(0, 0)
    if checkpoint.run_id != run_id:
        raise DataError(
            f"{path}: belongs to another run (other shards or SAEs); delete it to train anew, or choose another --out"
        )
    with opened(checkpoint.files) as parts:
        bank.restore(parts.names, parts.read, checkpoint.place.num_steps_done)
    return checkpoint.place


def forget_checkpoint(path: Path) -> None:
    """Take away what `save_checkpoint` wrote."""
    path.unlink(missing_ok=True)
    folder = folder_of_ranks(path)
    (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the rest is nothing
    shutil.rmtree(folder, ignore_errors=True)
