"""What an SAE's numbers must be held against: principal components, random directions and single coordinates at its own L0; and a
transcoder's: a linear map of what it reads, and as many principal components of what it writes, which see that itself.

Zero and mean are ablations of a whole site (baseline_sweep.py). All are fitted to training rows alone.
"""

from collections.abc import Callable, Iterable, Iterator
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


def edits_of(
    baselines: Iterable[Baseline], calibration: Calibration, seed: int, linear: LinearMap | None = None
) -> dict[Baseline, Edit]:
    """What each of a site's baselines makes of activations; random dictionaries of one width share their directions."""
    drawn: dict[int, RandomDirections] = {}
    edits = {}
    for baseline in baselines:
        if baseline.kind == "random_dictionary" and baseline.width not in drawn:
            drawn[baseline.width] = RandomDirections(baseline.width, calibration, seed)
        edits[baseline] = edit_of(baseline, calibration, linear, drawn.get(baseline.width))
    return edits


def edit_of(
    baseline: Baseline, calibration: Calibration, linear: LinearMap | None = None, directions: "RandomDirections | None" = None
) -> Edit:
    """What the baseline makes of activations; a `linear` map of what is read there, a random dictionary of `directions`."""
    match baseline.kind:
        case "linear":
            assert linear is not None, "a linear map is of a site that reads one place and writes another"
            return lambda x: (linear(x), torch.full((len(x),), float(x.shape[1]), device=x.device))
        case "pca":
            return lambda x: _project(x, calibration, baseline.size)
        case "neuron_basis":
            return lambda x: _keep_largest(x, calibration, baseline.size)
        case "random_dictionary":
            assert directions is not None, "a random dictionary has directions"
            sae = directions.dictionary(baseline.size)
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


class RandomDirections:
    """Unit vectors in random directions D, of which dictionaries of any L0 are made for one site's training rows."""

    def __init__(self, width: int, calibration: Calibration, seed: int) -> None:
        """`width` directions, always the same for one `seed`."""
        device, self._mean = calibration.rows.device, calibration.mean.float()
        generator = torch.Generator().manual_seed(seed)
        self._directions = normalize(torch.randn(width, len(self._mean), generator=generator), dim=1).to(device)
        self._rows = calibration.rows - self._mean
        self._kept: list[Tensor] = []

    def dictionary(self, l0: float) -> Sae:
        """An SAE of all directions: f = g JumpReLU(D (x - mean)) with one threshold, x_hat = D^T f + mean.

        The threshold lets `l0` latents fire on a training row, in the mean; the gain g is the least-squares one on those rows.
        """
        threshold = self._threshold(l0 * len(self._rows))
        product = squares = 0.0
        for rows, pre in self._pre_activations():
            x_hat = (pre * (pre > threshold)) @ self._directions
            product += float((x_hat.double() * rows).sum())
            squares += float(x_hat.double().square().sum())
        gain, width = product / squares if squares else 1.0, len(self._directions)
        bias = pre_activations(-self._mean, self._directions.T, self._directions.new_zeros(width))
        return Sae(
            gain * self._directions.T.contiguous(),
            self._directions,
            gain * bias,
            self._mean,
            torch.full((width,), gain * threshold, device=self._mean.device),
        )

    def _pre_activations(self) -> Iterator[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_sae"]]]:
        """Rows and their products with the directions, a chunk at a time; those of a single chunk are kept for the next call."""
        chunks = self._rows.split(max(1, CHUNK_ACTIVATIONS // len(self._directions)))
        if len(chunks) == 1:
            self._kept = self._kept or [chunks[0] @ self._directions.T]
        return zip(chunks, self._kept or (rows @ self._directions.T for rows in chunks), strict=True)

    def _threshold(self, wanted: float) -> float:
        """The threshold that about `wanted` pre-activations pass, in all."""
        if wanted <= 0:
            return torch.finfo(torch.float32).max
        top = max(float(pre.amax()) for _, pre in self._pre_activations())
        if top <= 0:
            return 0.0
        counts = torch.zeros(THRESHOLD_BINS, dtype=torch.float64)
        for _, pre in self._pre_activations():
            counts += torch.histc(pre[pre > 0], bins=THRESHOLD_BINS, min=0.0, max=top).double().cpu()
        passing = torch.cat([counts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return top * int((passing - wanted).abs().argmin()) / THRESHOLD_BINS
