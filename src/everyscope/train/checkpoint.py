"""A training group's state on disk, from which training resumes to the same bits, on any number of ranks.

One process writes one safetensors file, replaced whole. Several write a folder beside it: a file for each shard of the latents,
and then a manifest that names them. What no manifest names was never finished, and the checkpoint before stands until then.
Each rank that loads takes its own latents out of the files there are. Every file holds its own checksum.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import make_folder, read_sealed, write_sealed
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.train.training_group import TrainingGroup

MANIFEST = "manifest.json"
REMEDY = "delete it and run the same command again, which trains this training group from its first step"
FREE_FACTOR = 1.5
"""Free memory that a copy of the state must leave room in, over its own size [1]."""


@dataclass(frozen=True)
class TrainingPosition:
    """Where a run stands, besides its tensors."""

    num_steps_done: int
    log_bytes: int
    """Length of metrics.jsonl at that moment [bytes]; what a killed run wrote behind it is cut off."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    run_id: str
    place: TrainingPosition
    files: tuple[Path, ...]
    """In the order of the latents that they hold."""
    products: str
    """The precision of the steps that led here."""


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
            raise DamagedData(f"{name} has {start} latents in the checkpoint, expected {latents.stop}; {REMEDY}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


@contextmanager
def opened(files: tuple[Path, ...], rank: int | None = None, ranks: int = 1) -> Iterator[Parts]:
    """The tensors in these files, read as they are asked for; DamagedData where a file differs from its checksum.

    Of several ranks each compares some of the files, and a rank that finds damage ends them all; None compares no file, which
    is for one who wrote them just now.
    """
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DamagedData(
            f"{missing}: a file of the checkpoint is missing; delete {missing.parent} and run the same command again"
        )
    with ExitStack() as stack:
        checked = range(0) if rank is None else range(rank, len(files), ranks)
        yield Parts(
            [
                stack.enter_context(opened_tensors(file, is_checked=number in checked, remedy=REMEDY))
                for number, file in enumerate(files)
            ]
        )


def folder_of_ranks(path: Path) -> Path:
    """Where several ranks write the checkpoint that one process would write to `path`."""
    return path.with_suffix(".ranks")


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The one at `path`, by one process or by several: that of more steps, for a kill may leave both."""
    found = []
    if path.exists():
        with opened_tensors(path, is_checked=False, remedy=REMEDY) as file:  # compared where its tensors are read
            found.append(_checkpoint(file.metadata(), (path,), path))
    folder = folder_of_ranks(path)
    if (folder / MANIFEST).exists():
        manifest = read_sealed(folder / MANIFEST, f"delete {folder} and run the same command again")
        files = tuple(folder / str(name) for name in manifest.get("files", ()))
        found.append(_checkpoint(manifest, files, folder / MANIFEST))
    return max(found, key=lambda checkpoint: checkpoint.place.num_steps_done, default=None)


def _checkpoint(manifest: Mapping[str, Any], files: tuple[Path, ...], name: Path) -> Checkpoint:
    """The checkpoint that a file says it is of; DamagedData where it does not say so."""
    try:
        place = TrainingPosition(int(manifest["num_steps_done"]), int(manifest["log_bytes"]))
        if min(place.num_steps_done, place.log_bytes) < 0 or not files:
            raise ValueError(f"num_steps_done={place.num_steps_done}, log_bytes={place.log_bytes}, {len(files)} files")
        return Checkpoint(str(manifest["run_id"]), place, files, str(manifest.get("products", "float32")))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedData(f"{name}: is no checkpoint of a training group ({type(error).__name__}: {error}); {REMEDY}") from error


def save_checkpoint(path: Path, group: TrainingGroup, run_id: str, log_bytes: int) -> None:
    """Write the training group's tensors and its place; `run_id` names the run that may resume from it.

    Of several ranks all call this; the first one's `log_bytes` counts, and only it says that the checkpoint is whole.
    """
    if group.collective.mesh.ranks > 1:
        _save_shard(path, group, run_id, log_bytes)
        return
    _write(path, group.tensors(), _metadata(group, run_id, log_bytes))


def _metadata(group: TrainingGroup, run_id: str, log_bytes: int) -> dict[str, str]:
    return {"run_id": run_id, "num_steps_done": str(group.num_steps_done), "log_bytes": str(log_bytes)} | _precision(group)


def _precision(group: TrainingGroup) -> dict[str, str]:
    """Said only where it is not float32, which checkpoints without it are of."""
    return {} if group.products == "float32" else {"products": group.products}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    write_tensors(path, tensors, metadata, is_sealed=True)
    shutil.rmtree(folder_of_ranks(path), ignore_errors=True)


class Saver:
    """Checkpoints of a training group in training, written by a thread from a copy while the next steps are computed.

    The copy holds the state of one step, so a checkpoint has the bits that it would have had otherwise; files are replaced whole.
    Where the copy would not fit into free memory, and where several ranks must agree that a checkpoint is whole, training waits.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        """Checkpoints at `path`, as `save_checkpoint` writes them."""
        self._path, self._run_id = path, run_id
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def save(self, group: TrainingGroup, log_bytes: int) -> None:
        """Take the training group's state now and begin to write it; first waits for the checkpoint before, and raises its
        error.
        """
        self.wait()
        tensors = group.tensors()
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if group.collective.mesh.ranks > 1 or num_bytes * FREE_FACTOR > _free_bytes():
            save_checkpoint(self._path, group, self._run_id, log_bytes)
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        metadata = _metadata(group, self._run_id, log_bytes)
        self._under_way = self._writer.submit(_write, self._path, copies, metadata)

    def wait(self) -> None:
        """Until the checkpoint under way is whole; raises StorageError where it could not be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it: nobody else may write this file before."""
        self._writer.shutdown(wait=True)


def _free_bytes() -> int:
    """Memory that a process may take now without swapping, as Linux tells it [bytes]; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _save_shard(path: Path, group: TrainingGroup, run_id: str, log_bytes: int) -> None:
    """Every shard's file, by its first replica (all hold the same bits); then the manifest, then what it replaces goes."""
    mesh, folder = group.collective.mesh, make_folder(folder_of_ranks(path))
    names = [f"step_{group.num_steps_done}_shard_{shard}_of_{mesh.shards}.safetensors" for shard in range(mesh.shards)]
    if mesh.replica == 0:
        write_tensors(folder / names[mesh.shard], group.tensors(), is_sealed=True)
    group.collective.barrier()
    if mesh.rank == 0:
        manifest = {"run_id": run_id, "num_steps_done": group.num_steps_done, "log_bytes": log_bytes, "files": names}
        write_sealed(folder / MANIFEST, manifest | _precision(group))
        for old in folder.iterdir():
            if old.name not in (*names, MANIFEST):
                old.unlink()
        path.unlink(missing_ok=True)
    group.collective.barrier()  # no rank resumes from, or writes beside, what is being removed


def load_checkpoint(path: Path, group: TrainingGroup, run_id: str) -> TrainingPosition:
    """Restore the training group from the checkpoint at `path`, or leave it at step 0 where there is none.

    DataError for another run's, DamagedData for one that cannot be read.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return TrainingPosition(0, 0)
    if checkpoint.run_id != run_id:
        raise DataError(f"{path}: belongs to another run (other shards or SAEs); {REMEDY}, or choose another --out")
    if checkpoint.products != group.products:
        raise DataError(
            f"{path}: was trained in {checkpoint.products}, this run trains in {group.products}; set "
            f"precision={checkpoint.products} and the device of that run, or delete it to train this group from its first step"
        )
    if checkpoint.place.num_steps_done > group.steps:
        raise DamagedData(
            f"{path}: is of step {checkpoint.place.num_steps_done}, the training group ends at {group.steps}; {REMEDY}"
        )
    mesh = group.collective.mesh
    with opened(checkpoint.files, mesh.rank, mesh.ranks) as parts:
        try:
            group.restore(parts.names, parts.read, checkpoint.place.num_steps_done)
        except (SafetensorError, RuntimeError) as error:  # a tensor that is missing, or of another shape
            raise DamagedData(f"{path}: does not hold the tensors of this training group ({error}); {REMEDY}") from error
    return checkpoint.place


def forget_checkpoint(path: Path) -> None:
    """Take away what `save_checkpoint` wrote."""
    path.unlink(missing_ok=True)
    folder = folder_of_ranks(path)
    (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the rest is nothing
    shutil.rmtree(folder, ignore_errors=True)
