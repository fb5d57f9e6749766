"""All sums of one evaluation, and the file that lets it go on where it was killed.

The file holds float64 and int64 tensors bit by bit, so a resumed evaluation ends with the same bytes as an undisturbed one.
"""

import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from everyscope.base.progress import say
from everyscope.base.tensors import write_tensors
from everyscope.evaluate.losses import LossSums
from everyscope.evaluate.pca import PcaSums
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.names import Site


@dataclass
class SiteSums:
    """What is summed once per site."""

    zero_ablated: LossSums
    """Loss with the site's activations replaced by zeros."""
    mean_ablated: LossSums
    """Loss with them replaced by the training mean."""
    pca: PcaSums
    """The PCA baseline's projections."""


@dataclass
class SaeSums:
    """What is summed per SAE."""

    reconstruction: ReconstructionSums
    """Errors, sparsity and latents."""
    spliced: LossSums
    """Loss with the site's activations replaced by the SAE's reconstruction."""


@dataclass
class EvaluationSums:
    """The whole state of an evaluation between two batches."""

    clean: LossSums
    """Loss of the untouched model."""
    sites: dict[Site, SiteSums]
    saes: dict[str, SaeSums]
    """By the identity of the SAE's scores."""
    batches: int = 0
    """Batches done."""
    sequences: int = 0
    """Blocks done."""

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file, whole or not at all."""
        progress = json.dumps({"batches": self.batches, "sequences": self.sequences, "saes": sorted(self.saes)})
        write_tensors(path, self._tensors(), {"progress": progress})

    def restore(self, path: Path) -> None:
        """Take up the sums saved in `path`, if they are there and hold every SAE of ours; else stay as we are, and say so."""
        if not path.exists():
            return
        ours = self._tensors()
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                progress = json.loads((file.metadata() or {})["progress"])
                is_ours = set(self.saes) <= set(progress["saes"])
                saved = {name: file.get_tensor(name) for name in ours} if is_ours else {}
        except (safetensors.SafetensorError, KeyError, ValueError):
            say(f"{path} is damaged; the evaluation starts over")
            return
        if not is_ours:
            say("The half-finished evaluation found here is of other SAEs or settings; the evaluation starts over")
            return
        for name, tensor in ours.items():
            tensor.copy_(saved[name])
        self.batches, self.sequences = progress["batches"], progress["sequences"]

    def _tensors(self) -> dict[str, Tensor]:
        parts: dict[str, Any] = {"clean": self.clean}
        parts |= {f"sites.{site.folder}": sums for site, sums in self.sites.items()}
        parts |= {f"saes.{identity}": sums for identity, sums in self.saes.items()}
        return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in _flat(part).items()}


def _flat(part: Any) -> dict[str, Tensor]:
    """The tensors of nested dataclasses, by dotted name."""
    found: dict[str, Tensor] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            found |= {f"{field.name}.{name}": tensor for name, tensor in _flat(value).items()}
        else:
            found[field.name] = value
    return found
