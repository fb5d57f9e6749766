"""How good a reconstruction is: sums over a whole data set, and the numbers made from them.

Means of ratios depend on the batch size and on where batches end; a ratio of sums does not. So everything here is a float64
or int64 sum over unmasked rows, and ratios are taken once, at the end. A latent fires where f > 0, in every number below.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from everyscope.base.errors import DataError, NonFinite, ShapeMismatch
from everyscope.sae.kernels.cpu_codes import sum_latents

DENSE_FREQUENCY = 0.1
"""A latent that fires on more than this share of tokens is dense [1]."""


def fraction_unexplained(squared_error: float, squared_total: float) -> float:
    """squared_error / squared_total, the fraction of variance unexplained; DataError where there is no variance to explain."""
    if squared_total <= 0:
        raise DataError(f"the activations' sum of squares is {squared_total}, expected > 0; a constant cannot be explained")
    return squared_error / squared_total


def centred_squares(
    count: Num[Tensor, "*sets"], shifted_sum: Float[Tensor, "*sets d_in"], shifted_squares: Float[Tensor, "*sets"]
) -> Float[Tensor, "*sets"]:
    """Sum ||x - mean||^2 over each of some sets of rows about its own mean, from sums of x - r about any fixed r.

    sum ||x - r||^2 - ||sum (x - r)||^2 / count, 0 for an empty set. The nearer r lies to the mean, the less there is to cancel.
    """
    return shifted_squares - shifted_sum.square().sum(-1) / count.clamp(min=1)


@dataclass(frozen=True)
class RowMeasures:
    """What a reconstruction is worth row by row, float64."""

    errors: Float[Tensor, " batch"]
    """||x - x_hat||^2."""
    cosines: Float[Tensor, " batch"]
    """<x, x_hat> / (||x|| ||x_hat||), 0 where either norm is 0."""
    firings: Float[Tensor, " batch"]
    """Latents that fire [latents]."""


@dataclass(frozen=True)
class LatentSums:
    """What is summed of the latents of some rows."""

    firings: Int64[Tensor, " d_sae"]
    """Rows on which each fires."""
    sums: Float[Tensor, " d_sae"]
    """Float64."""
    maxima: Float[Tensor, " d_sae"]
    """Float64, at least 0."""
    by_row: Int64[Tensor, " batch"]
    """Latents that fire on each row."""


def latent_sums(f: Float[Tensor, "batch d_sae"]) -> LatentSums:
    """The sums of `f`, in one pass where it is on a CPU."""
    if f.device.type != "cpu":
        fires, none = f > 0, torch.zeros(1, f.shape[1], dtype=f.dtype, device=f.device)
        return LatentSums(fires.sum(0), f.sum(0, dtype=torch.float64), torch.cat([f, none]).amax(0).double(), fires.sum(1))
    sums, maxima = np.zeros(f.shape[1]), np.zeros(f.shape[1])
    firings, by_row = np.zeros(f.shape[1], np.int64), np.zeros(len(f), np.int64)
    exact = f.detach() if f.dtype == torch.float64 else f.detach().float()
    sum_latents(exact.contiguous().numpy(), firings, sums, maxima, by_row)
    return LatentSums(*(torch.from_numpy(part) for part in (firings, sums, maxima, by_row)))


@dataclass
class ReconstructionSums:
    """Sums over the rows seen so far, of raw activations x, their reconstructions x_hat and latents f."""

    reference: Float[Tensor, " d_in"]
    """The fixed vector r that x is shifted by; the mean of the training rows does best."""
    count: Int64[Tensor, ""]
    """Rows [tokens]."""
    shifted_sum: Float[Tensor, " d_in"]
    """sum (x - r)."""
    shifted_squares: Float[Tensor, ""]
    """sum ||x - r||^2."""
    squares: Float[Tensor, ""]
    """sum ||x||^2."""
    errors: Float[Tensor, ""]
    """sum ||x - x_hat||^2."""
    cosines: Float[Tensor, ""]
    """sum <x, x_hat> / (||x|| ||x_hat||), 0 where either norm is 0."""
    reconstruction_squares: Float[Tensor, ""]
    """sum ||x_hat||^2."""
    products: Float[Tensor, ""]
    """sum <x, x_hat>."""
    norm_ratios: Float[Tensor, ""]
    """sum ||x_hat|| / ||x|| over rows that are not 0."""
    nonzero: Int64[Tensor, ""]
    """Rows that are not 0 [tokens]."""
    firings: Int64[Tensor, " d_sae"]
    """Rows on which each latent fires [tokens]."""
    activation_sums: Float[Tensor, " d_sae"]
    """Sum of each latent's activation."""
    activation_maxima: Float[Tensor, " d_sae"]
    """Largest activation of each latent, 0 where it never fires."""

    @classmethod
    def start(cls, reference: Float[Tensor, " d_in"], d_sae: int) -> Self:
        """Empty sums of an SAE with `d_sae` latents, on the device of `reference`."""
        values = {"reference": reference.detach().double().clone()}
        for field in fields(cls)[1:]:
            is_count = field.name in ("count", "nonzero", "firings")
            size = {"shifted_sum": (len(reference),), "firings": (d_sae,)}.get(field.name, ())
            size = (d_sae,) if field.name.startswith("activation_") else size
            values[field.name] = torch.zeros(size, dtype=torch.int64 if is_count else torch.float64, device=reference.device)
        return cls(**values)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The sums that `tensors()` gave, bit by bit; DataError where one is missing."""
        missing = [field.name for field in fields(cls) if field.name not in tensors]
        if missing:
            raise DataError(f"saved sums lack {', '.join(missing)}; delete the file and evaluate again")
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """Everything the sums hold, by name: float64 and int64, so that saving them loses nothing."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def update(
        self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], f: Float[Tensor, "batch d_sae"]
    ) -> RowMeasures:
        """Add a batch of unmasked rows and give what is summed row by row.

        ShapeMismatch for other sizes, NonFinite for NaN or infinity (this syncs the device).
        """
        want = ((len(x), len(self.reference)), (len(x), len(self.reference)), (len(x), len(self.firings)))
        got = (tuple(x.shape), tuple(x_hat.shape), tuple(f.shape))
        if got != want:
            raise ShapeMismatch(f"x, x_hat and f have shapes {got}, expected {want}; are these one SAE's?")
        x, x_hat = x.double(), x_hat.double()
        latents = latent_sums(f)
        errors, products = (x - x_hat).square().sum(1), (x * x_hat).sum(1)
        norms, norms_hat = x.norm(dim=1), x_hat.norm(dim=1)
        cosines = torch.where(norms * norms_hat > 0, products / (norms * norms_hat), 0)
        measures = RowMeasures(errors, cosines, latents.by_row.double())
        if not len(x):
            return measures
        if not (math.isfinite(float(errors.sum())) and torch.isfinite(latents.sums).all()):
            raise NonFinite(f"NaN or infinity among {len(x)} activations or reconstructions; harvest in float32, check the SAE")
        shifted = x - self.reference
        self.count += len(x)
        self.shifted_sum += shifted.sum(0)
        self.shifted_squares += shifted.square().sum()
        self.squares += x.square().sum()
        self.errors += errors.sum()
        self.cosines += cosines.sum()
        self.reconstruction_squares += x_hat.square().sum()
        self.products += products.sum()
        self.norm_ratios += torch.where(norms > 0, norms_hat / norms, 0).sum()
        self.nonzero += (norms > 0).sum()
        self.firings += latents.firings
        self.activation_sums += latents.sums
        self.activation_maxima = torch.maximum(self.activation_maxima, latents.maxima)
        return measures

    def merged(self, other: Self) -> Self:
        """The sums over the rows of both, which have the same reference."""
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        maxima = torch.maximum(self.activation_maxima, other.activation_maxima)
        return replace(self, **(added | {"reference": self.reference, "activation_maxima": maxima}))

    @property
    def num_tokens(self) -> int:
        """Rows summed [tokens]; DataError before the first."""
        if not int(self.count):
            raise DataError("no unmasked token was evaluated; give more held-out text or a larger held_out_fraction")
        return int(self.count)

    @property
    def centred_squares(self) -> float:
        """Sum ||x - mean||^2 about the mean of these very rows."""
        assert self.num_tokens
        return float(centred_squares(self.count, self.shifted_sum, self.shifted_squares))

    @property
    def fvu(self) -> float:
        """Sum ||x - x_hat||^2 / sum ||x - mean||^2 [1]: 0 for the identity, 1 for the mean's predictor."""
        return fraction_unexplained(float(self.errors), self.centred_squares)

    @property
    def fvu_uncentred(self) -> float:
        """Sum ||x - x_hat||^2 / sum ||x||^2 [1]: flattered by a large mean; given for comparison only."""
        return fraction_unexplained(float(self.errors), float(self.squares))

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token [latents]."""
        return int(self.firings.sum()) / self.num_tokens

    @property
    def cosine(self) -> float:
        """Mean cosine between x and x_hat [1]."""
        return float(self.cosines) / self.num_tokens

    @property
    def mse(self) -> float:
        """Mean over tokens of ||x - x_hat||^2, not divided by d_in [squared raw units]."""
        return float(self.errors) / self.num_tokens

    @property
    def l2_ratio(self) -> float | None:
        """Mean of ||x_hat|| / ||x|| over rows that are not 0 [1]; None where all are."""
        return float(self.norm_ratios) / int(self.nonzero) if int(self.nonzero) else None

    @property
    def reconstruction_bias(self) -> float | None:
        """Sum ||x_hat||^2 / sum <x, x_hat> [1], under 1 where reconstructions shrink (arXiv 2404.16014); None if undefined."""
        return float(self.reconstruction_squares / self.products) if float(self.products) else None

    @property
    def frequencies(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each latent fires [1], float64."""
        return self.firings.double() / self.num_tokens

    @property
    def mean_activations(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of each latent over the tokens on which it fires, float64; 0 where it never does."""
        return self.activation_sums / self.firings.clamp(min=1)

    @property
    def dead_fraction(self) -> float:
        """Share of latents that fired on none of the tokens [1]; it falls as tokens grow."""
        return int((self.firings == 0).sum()) / len(self.firings)

    @property
    def dense_fraction(self) -> float:
        """Share of latents that fire on more than DENSE_FREQUENCY of the tokens [1]."""
        return int((self.frequencies > DENSE_FREQUENCY).sum()) / len(self.firings)
