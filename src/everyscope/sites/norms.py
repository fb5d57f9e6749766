"""What the norm before an MLP multiplies by and adds, once its size is divided out: what converts transcoders' inputs."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everyscope.base.errors import ModelError
from everyscope.sites.logits import gain_of
from everyscope.sites.registry import ModelAdapter

LARGE = 2.0**13
"""Size of the row that a norm is asked about: beside it the norm's epsilon is nothing, and its square is exact."""


@dataclass(frozen=True, eq=False)
class Affine:
    """Of a norm: what it gives is gain * x_normalised + bias, coordinate by coordinate."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    """Zero for RMSNorm."""


@torch.no_grad()
def mlp_norm_of(adapter: ModelAdapter, layer: int) -> Affine:
    """The gain and bias of the norm before the MLP of `layer`, float32; found by running it, for Gemma multiplies by 1 + weight.

    ModelError where there is no such norm, or where it is neither RMSNorm nor LayerNorm.
    """
    norm = adapter.mlp_norm(layer)
    if norm is None:
        raise ModelError(f"layer {layer}: the MLP reads the residual stream, without a norm; its input has one form only")
    return affine_of(norm, adapter.d_model)


@torch.no_grad()
def affine_of(norm: nn.Module, d_model: int) -> Affine:
    """The gain and bias of any norm, float32; ModelError where it is neither RMSNorm nor LayerNorm."""
    found = gain_of(norm, d_model)  # refuses other norms
    if isinstance(norm, nn.LayerNorm):
        bias = torch.zeros_like(found.gain) if norm.bias is None else norm.bias.float()
        return Affine(norm.weight.float(), bias)
    if found.is_centring:
        raise ModelError(f"{type(norm).__name__} centres and is no torch LayerNorm; teach sites/norms.py this norm")
    signs = torch.ones_like(found.gain)
    signs[1::2] = -1
    gain = copy.deepcopy(norm).float()(LARGE * signs[None])[0] * signs
    return Affine(gain, torch.zeros_like(gain))
