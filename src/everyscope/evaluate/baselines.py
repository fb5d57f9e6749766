"""What an SAE's numbers must be held against: principal components, random directions and single coordinates at its own L0; and a
transcoder's: a linear map of what it reads, and as many principal components of what it writes, which see that itself.

Zero and mean are ablations of a whole site (baseline_sweep.py). All are fitted to training rows alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.linear import LinearMap
from everyscope.sae.folded import Sae
from everyscope.sae.functional import pre_activations

BaselineKind = Literal["pca", "random_dictionary", "neuron_basis", "linear"]
THRESHOLD_BINS = 1 << 16
"""Steps between 0 and the largest pre-activation, of which one becomes a random dictionary's threshold."""
CHUNK_ACTIVATIONS = 1 << 26
"""Latent activations held at once [numbers]."""

Edit = Callable[[Float[Tensor, "n d_in"]], tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]]
"""Raw activations to their reconstruction and the number of directions that were used for each row."""


@dataclass(frozen=True, order=True)
class Baseline:
    """One baseline of one size."""

    kind: BaselineKind
    size: int
    """Components, coordinates, or the L0 that the threshold is set for; 0 of a linear map, which has all inputs [latents]."""
    width: int = 0
    """Directions of a random dictionary; 0 for the others [latents]."""

    @property
    def name(self) -> str:
        """As in pca_25 or random_dictionary_512_25."""
        if self.kind == "linear":
            return self.kind
        return f"{self.kind}_{self.width}_{self.size}" if self.width else f"{self.kind}_{self.size}"

    @property
    def needs_rows(self) -> bool:
        """Whether its errors are summed row by row; those of components and coordinates follow from their squares."""
        return self.kind in ("random_dictionary", "linear")


def baselines_of(l0: float, width: int, *, is_transcoder: bool = False) -> tuple[Baseline, ...]:
    """The baselines of an SAE: each at its L0, rounded; the dictionary with as many directions as it has latents."""
    size = round(l0)
    if is_transcoder:
        return Baseline("pca", size), Baseline("linear", 0)
    return Baseline("pca", size), Baseline("random_dictionary", size, width), Baseline("neuron_basis", size)


def edit_of(baseline: Baseline, calibration: Calibration, seed: int, linear: LinearMap | None = None) -> Edit:
    """What the baseline makes of activations; a `linear` map of what is read there."""
    match baseline.kind:
        case "linear":
            assert linear is not None, "a linear map is of a site that reads one place and writes another"
            return lambda x: (linear(x), torch.full((len(x),), float(x.shape[1]), device=x.device))
        case "pca":
            return lambda x: _project(x, calibration, baseline.size)
        case "neuron_basis":
            return lambda x: _keep_largest(x, calibration, baseline.size)
        case "random_dictionary":
            sae = random_dictionary(baseline.width, baseline.size, calibration, seed)
            return lambda x: _by_sae(x, sae)


def _project(x: Float[Tensor, "n d_in"], calibration: Calibration, size: int) -> tuple[Tensor, Tensor]:
    kept = calibration.components[:, :size]
    x_hat = calibration.mean + (x.double() - calibration.mean) @ kept @ kept.T
    return x_hat, torch.full((len(x),), float(kept.shape[1]), device=x.device)


def _keep_largest(x: Float[Tensor, "n d_in"], calibration: Calibration, size: int) -> tuple[Tensor, Tensor]:
    centred = x.double() - calibration.mean
    kept = centred.abs().topk(min(size, x.shape[1]), dim=1).indices
    x_hat = calibration.mean + torch.zeros_like(centred).scatter(1, kept, centred.gather(1, kept))
    return x_hat, torch.full((len(x),), float(kept.shape[1]), device=x.device)


def _by_sae(x: Float[Tensor, "n d_in"], sae: Sae) -> tuple[Tensor, Tensor]:
    reconstructions, firings = [], []
    for rows in x.split(max(1, CHUNK_ACTIVATIONS // sae.d_sae)):
        f = sae.encode(rows)
        reconstructions.append(sae.decode(f))
        firings.append((f > 0).sum(1).float())
    return torch.cat(reconstructions), torch.cat(firings)


def random_dictionary(width: int, l0: float, calibration: Calibration, seed: int) -> Sae:
    """Unit vectors in random directions D as an SAE: f = g JumpReLU(D (x - mean)) with one threshold, x_hat = D^T f + mean.

    The threshold lets `l0` latents fire on a training row, in the mean; the gain g is the least-squares one on those rows.
    """
    device, mean = calibration.rows.device, calibration.mean.float()
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(width, len(mean), generator=generator), dim=1).to(device)
    centred = calibration.rows - mean
    chunks = centred.split(max(1, CHUNK_ACTIVATIONS // width))
    threshold = _threshold(chunks, directions, l0 * len(centred))
    product = squares = 0.0
    for rows in chunks:
        pre = rows @ directions.T
        x_hat = (pre * (pre > threshold)) @ directions
        product += float((x_hat.double() * rows).sum())
        squares += float(x_hat.double().square().sum())
    gain = product / squares if squares else 1.0
    bias = pre_activations(-mean, directions.T, directions.new_zeros(width))
    return Sae(
        gain * directions.T.contiguous(), directions, gain * bias, mean, torch.full((width,), gain * threshold, device=device)
    )


def _threshold(chunks: tuple[Float[Tensor, "n d_in"], ...], directions: Float[Tensor, "d_sae d_in"], wanted: float) -> float:
    """The threshold that about `wanted` pre-activations pass, in all."""
    if wanted <= 0:
        return torch.finfo(torch.float32).max
    top = max(float((rows @ directions.T).amax()) for rows in chunks)
    if top <= 0:
        return 0.0
    counts = torch.zeros(THRESHOLD_BINS, dtype=torch.float64)
    for rows in chunks:
        pre = (rows @ directions.T).flatten()
        counts += torch.histc(pre[pre > 0], bins=THRESHOLD_BINS, min=0.0, max=top).double().cpu()
    passing = torch.cat([counts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return top * int((passing - wanted).abs().argmin()) / THRESHOLD_BINS
