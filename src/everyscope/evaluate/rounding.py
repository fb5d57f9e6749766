"""SAEs in shorter number formats: what they cost when they are stored, or run, in fewer bits."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.evaluate.config import SaeDtype
from everyscope.sae.folded import Sae

LEVELS = 127
"""The largest integer of a weight in int8; -128 is not used, so that the scale is symmetric."""


def rounded(sae: Sae, dtype: SaeDtype) -> Sae:
    """The SAE as it is in `dtype`: bfloat16 runs in bfloat16, int8 rounds all weight matrices and runs in float32."""
    return ROUNDINGS[dtype](sae)


def _cast(sae: Sae, dtype: torch.dtype) -> Sae:
    return sae.with_tensors(None, **{name: tensor.to(dtype) for name, tensor in sae.own_tensors().items()})


def _int8(sae: Sae) -> Sae:
    sae = _cast(sae, torch.float32)
    matrices = {"W_enc": per_latent(sae.W_enc.T).T.contiguous(), "W_dec": per_latent(sae.W_dec)}
    if sae.W_skip is not None:
        matrices["W_skip"] = per_latent(sae.W_skip)
    return sae.with_tensors(None, **matrices)


def per_latent(weights: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Each row rounded to multiples of its largest magnitude / 127; rows of zeros stay."""
    scale = weights.abs().amax(1, keepdim=True) / LEVELS
    return torch.where(scale > 0, (weights / scale).round() * scale, weights)


ROUNDINGS: dict[SaeDtype, Callable[[Sae], Sae]] = {
    "float32": lambda sae: _cast(sae, torch.float32),
    "bfloat16": lambda sae: _cast(sae, torch.bfloat16),
    "int8": _int8,
}
