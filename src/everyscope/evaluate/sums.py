"""The state of an evaluation between two batches, and the files from which it resumes after a kill.

A file holds float64 and int64 tensors bit by bit, so a resumed evaluation ends with the same bytes as an undisturbed one.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from everyscope.base.errors import DataError
from everyscope.base.progress import say
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.evaluate.cost import Cost
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.uniformity import UniformitySums
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.names import Site

SAVE_SECONDS, SAVE_SHARE = 1.0, 20.0
"""Sums are saved at this interval [s], and no sooner than this multiple of the last saving's time [1]."""


@dataclass
class SaeSums:
    """What is summed per SAE."""

    reconstruction: ReconstructionSums
    """Errors, sparsity and latents, over usual rows."""
    massive: ReconstructionSums
    """The same over massive rows."""
    rows: Tables
    """||x - x_hat||^2, cosine and latents that fire, of usual rows by group."""
    massive_rows: Tables
    """The same of massive rows, by document."""
    losses: Tables
    """Loss with the reconstruction in the activations' place and KL(clean || spliced), by group."""
    head: Tables
    """That loss, by document, over the blocks in which ablations are spliced too."""
    uniformity: UniformitySums
    """Entropies of attributions."""


@dataclass
class State:
    """Named sums of one sweep over the held-out text, and how far it has come."""

    parts: Mapping[str, Any]
    """Dataclasses of tensors, by name."""
    text: str
    """Identity of the text that is swept over."""
    batches: int = 0
    """Batches done."""
    steps: int = 0
    """Steps done of the next one."""
    cost: Cost = field(default_factory=Cost)
    """What they took."""
    _saved: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def step(self, path: Path) -> None:
        """A step of the next batch is done: it is kept in `path` where that is due."""
        self.steps += 1
        if self.is_due:
            self.save(path)

    def batch(self, path: Path, cost: Cost, is_needed: bool) -> None:
        """All steps of a batch are done, at `cost`: it is kept where that is due, or needed anyway."""
        self.batches, self.steps = self.batches + 1, 0
        self.cost += cost
        if is_needed or self.is_due:
            self.save(path)

    @property
    def is_due(self) -> bool:
        """Whether saving costs little by now: so that a process that is killed every few seconds still gets on."""
        return time.monotonic() > self._saved + max(SAVE_SECONDS, SAVE_SHARE * self._took)

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file, whole or not at all."""
        began = time.monotonic()
        header = {
            "text": self.text,
            "batches": self.batches,
            "steps": self.steps,
            "cost": asdict(self.cost),
            "parts": sorted(self.parts),
        }
        write_tensors(path, _named(self.parts), {"progress": json.dumps(header)}, is_sealed=True)
        self._saved = time.monotonic()
        self._took = self._saved - began

    def restore(self, path: Path) -> None:
        """Load the sums saved in `path`, if they exist and hold every part of ours; else keep our own and log why."""
        if not path.exists():
            return
        ours = _named(self.parts)
        try:
            with opened_tensors(path) as file:
                header = json.loads((file.metadata() or {})["progress"])
                places = int(header["batches"]), int(header["steps"])
                is_ours = header["text"] == self.text and set(self.parts) <= set(header["parts"])
                saved = {name: file.get_tensor(name) for name in ours} if is_ours else {}
        except (DataError, KeyError, TypeError, ValueError):
            say(f"{path} is corrupted; the evaluation starts over")
            return
        if not is_ours:
            say("The unfinished evaluation here is of other SAEs, settings or text; starting over")
            return
        for name, tensor in ours.items():
            tensor.copy_(saved[name])
        (self.batches, self.steps), self.cost = places, Cost(**header["cost"])


@dataclass
class SaeState:
    """The parts of the sweep that measures SAEs, by what they are of."""

    clean: Tables
    """Positions and loss of the untouched model, by group."""
    head: Tables
    """The same by document, over the blocks in which ablations are spliced too."""
    sites: dict[Site, Tables]
    """Moments of each site's usual activations, by group."""
    massive: dict[Site, Tables]
    """Those of its massive ones, by document."""
    saes: dict[str, SaeSums]
    """By the identity of the SAE's scores."""

    @property
    def parts(self) -> dict[str, Any]:
        """All of them, by name."""
        named: dict[str, Any] = {"clean": self.clean, "head": self.head}
        named |= {f"sites.{site.folder}": tables for site, tables in self.sites.items()}
        named |= {f"massive.{site.folder}": tables for site, tables in self.massive.items()}
        return named | {f"saes.{identity}": sums for identity, sums in self.saes.items()}


def save_part(path: Path, part: Any, source: str) -> None:
    """Keep a finished part in a file of its own, with what it was made from."""
    write_tensors(path, _flat(part), {"source": source}, is_sealed=True)


def restore_part(path: Path, part: Any, source: str) -> bool:
    """Fill `part` from the file if it exists and was made from the same; True if so."""
    if not path.exists():
        return False
    try:
        with opened_tensors(path) as file:
            if (file.metadata() or {}).get("source") != source:
                return False
            for name, tensor in _flat(part).items():
                tensor.copy_(file.get_tensor(name))
    except DataError:
        say(f"{path} is corrupted; measuring it again")
        return False
    return True


def _named(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in _flat(part).items()}


def _flat(part: Any) -> dict[str, Tensor]:
    """The tensors of nested dataclasses and dicts, by dotted name."""
    if isinstance(part, Tensor):
        return {"": part}
    values = {item.name: getattr(part, item.name) for item in fields(part)} if is_dataclass(part) else part
    return {f"{key}.{name}".rstrip("."): tensor for key, value in values.items() for name, tensor in _flat(value).items()}
