"""Transcoders of random numbers for the tiny models of tests, and ones that reproduce an MLP exactly."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site


def transcoder(
    layer: int, d_model: int, width: int, *, has_skip: bool = False, convention: str = "mlp_input", seed: int = 0
) -> Sae:
    """About half of its latents are active, its biases are far from 0, and its skip, if any, is asymmetric."""
    generator = torch.Generator().manual_seed(100 * seed + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    reads = Site("resid_mid" if convention == "residual" else "mlp_in", layer)
    return Sae(
        draw(d_model, width) / d_model**0.5,
        draw(width, d_model) / width**0.5,
        0.1 * draw(width),
        draw(d_model),
        0.5 * draw(width).abs(),
        0.3 * draw(d_model, d_model) if has_skip else None,
        metadata=SaeMetadata(site=reads, target=Site("mlp_out", layer), convention=convention),
    )


class ReluMlp(nn.Module):
    """An MLP that a transcoder can be: relu(x W + b) V + c."""

    def __init__(self, coder: Sae) -> None:
        super().__init__()
        self.tensors = coder.own_tensors()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.tensors["W_enc"] + self.tensors["b_enc"]) @ self.tensors["W_dec"] + self.tensors["b_dec"]


def relu_transcoder(layer: int, d_model: int, width: int, seed: int = 0) -> Sae:
    """With threshold 0, as `ReluMlp` computes; b_dec is 0, as in an MLP without biases."""
    coder = transcoder(layer, d_model, width, seed=seed)
    changed = {"threshold": torch.zeros(width), "b_dec": torch.zeros(d_model), "b_enc": torch.zeros(width)}
    return coder.with_tensors(replace(coder.metadata), **changed)
