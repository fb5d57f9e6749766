"""Between raw activations and what SAEs train on: which rows are left out, what is subtracted, what divides.

Training works on x = (x_raw - mean) / scale with E||x||^2 = 1 over usual rows. Without a mean that is Gemma Scope's scaling
(arXiv 2408.05147, section 3.1). Real activations have means many times their spread: scaled about zero, the signal shrinks by
that ratio while thresholds, bandwidth and steps stay, and training fails. Both fold away exactly (`sae.trainable.fold`).
Rows that are usual by their norm may still be huge beside that spread; a few spoil an SAE, so they are shortened.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """How a group of SAEs sees its activations; fixed for the whole run."""

    scale: float
    """What rows are divided by, in the activations' units."""
    mean: Float64[np.ndarray, " d_in"] | None = None
    """What is subtracted before; None subtracts nothing."""
    norm_limit: float = math.inf
    """Rows of a larger L2 norm are massive and left out; infinity keeps all."""
    largest_row: float = math.inf
    """Normalised rows of a larger norm are shortened to it, in training alone; infinity shortens none."""

    def __call__(self, batch: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The normalised rows of a raw float32 batch. Usual rows take the place of massive ones, so that sizes stay."""
        if batch.device.type == "cpu":
            # By numpy: torch would wake threads that spin on, for some milliseconds, on cores that the step's own need.
            rows = batch.numpy()
            if self.norm_limit < math.inf:
                rows = self._usual_on_cpu(rows)
            if self.mean is not None:
                rows = rows - self.mean.astype(np.float32)
            return torch.from_numpy(self._shortened_on_cpu(rows / np.float32(self.scale)))
        return self.on_device(batch, mean_on(self, batch.device))

    def on_device(self, batch: Float[Tensor, "batch d_in"], mean: Float[Tensor, " d_in"] | None) -> Float[Tensor, "batch d_in"]:
        """The same where `mean` lies on the batch's device already: nothing is copied, and nothing waits."""
        if self.norm_limit < math.inf:
            batch = _replaced(batch, is_massive(batch, self.norm_limit))
        if mean is not None:
            batch = batch - mean
        x = batch / self.scale
        return _shortened(x, self.largest_row) if self.largest_row < math.inf else x

    def _shortened_on_cpu(self, x: Float[np.ndarray, "batch d_in"]) -> Float[np.ndarray, "batch d_in"]:
        if self.largest_row < math.inf:
            norms = np.sqrt(np.einsum("ij,ij->i", x, x))
            long = norms > self.largest_row
            x[long] *= (np.float32(self.largest_row) / norms[long])[:, None]
        return x

    def _usual_on_cpu(self, rows: Float[np.ndarray, "batch d_in"]) -> Float[np.ndarray, "batch d_in"]:
        massive = np.einsum("ij,ij->i", rows, rows) > np.float32(self.norm_limit) ** 2
        return _replaced(torch.from_numpy(rows), torch.from_numpy(massive)).numpy() if massive.any() else rows


def mean_on(normalisation: Normalisation | None, device: torch.device) -> Float[Tensor, " d"] | None:
    """What the normalisation subtracts, on a device; None where it subtracts nothing or there is none."""
    if normalisation is None or normalisation.mean is None:
        return None
    return torch.as_tensor(normalisation.mean, dtype=torch.float32, device=device)


def normalised_pair(
    of_input: Normalisation,
    of_target: Normalisation,
    batch: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    means: tuple[Tensor | None, ...] | None = None,
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
    """Both sides of a transcoder's rows. What is massive on either side is left out on both; the same row takes its place there.

    Each side is centred, divided and shortened as its own normalisation says; by `means` that lie on the rows' device, if given.
    """
    if math.isfinite(of_input.norm_limit) or math.isfinite(of_target.norm_limit):
        massive = NormLimits(of_input.norm_limit, of_target.norm_limit).massive(batch, target)
        batch, target = _replaced(batch, massive), _replaced(target, massive)
    all_rows = replace(of_input, norm_limit=math.inf), replace(of_target, norm_limit=math.inf)
    if means is not None:
        return all_rows[0].on_device(batch, means[0]), all_rows[1].on_device(target, means[1])
    return all_rows[0](batch), all_rows[1](target)


def is_massive(rows: Float[Tensor, "*batch d_in"], norm_limit: float) -> Bool[Tensor, "*batch"]:
    """Whether each row's L2 norm is above the limit; one rule for training, metrics and descriptions."""
    return rows.float().square().sum(-1) > norm_limit**2


@dataclass(frozen=True)
class NormLimits:
    """Norms above which rows are massive where a coder reads and where it writes; infinite where none is."""

    read: float
    written: float
    """The same of an SAE, which writes the place that it reads."""

    def massive(self, read: Float[Tensor, "n d_in"], written: Float[Tensor, "n d_out"]) -> Bool[Tensor, " n"]:
        """Which rows are massive on either side; an SAE's, which are the same tensor on both, are looked at once."""
        massive = is_massive(written, self.written)
        return massive if read is written else massive | is_massive(read, self.read)


def _shortened(x: Float[Tensor, "batch d_in"], largest: float) -> Float[Tensor, "batch d_in"]:
    return x * (largest / x.norm(dim=1, keepdim=True)).clamp(max=1)


def _replaced(batch: Float[Tensor, "batch d_in"], massive: Bool[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
    """The batch with each massive row replaced by the usual row before it, or, at its start, by the first usual row.

    Rows come shuffled, so the copies are a random sample of the usual rows, and the mean gradient is that over usual rows alone.
    The size stays, and nothing waits for the device. A batch without usual rows becomes zero.
    """
    rows = torch.arange(len(batch), device=batch.device)
    usual = ~massive
    before = torch.where(usual, rows, -1).cummax(0).values
    first = usual.float().argmax()
    return torch.where(usual.any(), batch[torch.where(before < 0, first, before)], 0.0)
