"""The PCA baseline: what as many principal components as an SAE has active latents would explain.

Components come from training rows, the score from held-out rows: the baseline is fitted and tested as the SAEs are.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import safetensors
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from everyscope.base.errors import DataError
from everyscope.base.progress import say
from everyscope.base.tensors import write_tensors
from everyscope.sae.metrics import centred_squares, fraction_unexplained
from everyscope.shards.reader import Shards

CHUNK_ROWS = 1 << 14
"""Rows read at once [rows]."""


@dataclass(frozen=True)
class Pca:
    """A full orthonormal basis about a mean, in order of falling variance."""

    mean: Float[Tensor, " d_in"]
    """Mean of the training rows used, float64."""
    components: Float[Tensor, "d_in d_in"]
    """Column k is component k, float64; its largest entry is positive."""
    variances: Float[Tensor, " d_in"]
    """Variance of the training rows along each component, float64."""


def fit_pca(shards: Shards, num_rows: int) -> Pca:
    """The components of the first `num_rows` rows of `shards` (all, if there are fewer), in float64."""
    num_rows = min(num_rows, shards.num_rows)
    shift = torch.as_tensor(shards.statistics.mean, dtype=torch.float64)
    total, outer = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for start in range(0, num_rows, CHUNK_ROWS):
        rows = shards.rows(start, min(start + CHUNK_ROWS, num_rows)).double() - shift
        total += rows.sum(0)
        outer += rows.T @ rows
    offset = total / num_rows
    variances, components = torch.linalg.eigh(outer / num_rows - torch.outer(offset, offset))
    variances, components = variances.flip(0), components.flip(1)
    peaks = components.abs().argmax(0)
    components = components * components[peaks, torch.arange(len(peaks))].sign()
    return Pca(shift + offset, components.contiguous(), variances.contiguous())


def cached_pca(path: Path, shards: Shards, num_rows: int) -> Pca:
    """The PCA kept in `path` if it was made from these rows; else it is made now, and kept there."""
    source = f"{shards.identity} {min(num_rows, shards.num_rows)}"
    if path.exists():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("source") == source:
                    return Pca(**{field.name: file.get_tensor(field.name) for field in fields(Pca)})
        except safetensors.SafetensorError:
            say(f"{path} is damaged and is made anew")
    pca = fit_pca(shards, num_rows)
    write_tensors(path, {field.name: getattr(pca, field.name) for field in fields(pca)}, {"source": source})
    return pca


@dataclass
class PcaSums:
    """Sums over held-out rows from which the FVU of any number of components follows."""

    count: Int64[Tensor, ""]
    """Rows [tokens]."""
    projections: Float[Tensor, " d_in"]
    """sum <x - m, v_k> for each component, float64; m is the training mean."""
    squared_projections: Float[Tensor, " d_in"]
    """sum <x - m, v_k>^2 for each component, float64."""

    @classmethod
    def start(cls, d_in: int) -> Self:
        """Empty sums, on the CPU."""
        zeros = torch.zeros(d_in, dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.int64), zeros, zeros.clone())

    def update(self, x: Float[Tensor, "batch d_in"], pca: Pca) -> None:
        """Add unmasked rows of raw activations."""
        projected = (x.double() - pca.mean.to(x.device)) @ pca.components.to(x.device)
        self.count += len(x)
        self.projections += projected.sum(0).cpu()
        self.squared_projections += projected.square().sum(0).cpu()

    def fvu(self, num_components: int) -> float:
        """FVU of the training mean plus the first `num_components` components (at most d_in of them count).

        The basis is complete, so the error is the squares along the components left out: nothing cancels.
        """
        if not int(self.count):
            raise DataError("no unmasked token was evaluated; give more held-out text")
        error = float(self.squared_projections[num_components:].sum())
        total = centred_squares(int(self.count), self.projections, float(self.squared_projections.sum()))
        return fraction_unexplained(error, total)
