"""What sparsity costs: the terms of the loss that depend on how often latents fire.

They reach thresholds alone, through the straight-through estimate of the firing rate's derivative, so all that training needs
of them is their derivative by each latent's rate.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.config import SaeConfig


def penalty(config: SaeConfig, coefficient: float | Tensor, rates: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """The derivative of the sparsity terms by each latent's firing rate p_i, its share of the batch's rows.

    Gemma Scope (arXiv 2408.05147, eq. 4): coefficient * sum_i p_i, where sum_i p_i = L0. With a target, as in Gemma Scope 2:
    coefficient * (L0 / target - 1)^2. Added to either, where the preset sets a frequency_limit: frequency_coefficient *
    sum_i max(0, p_i / limit - 1)^2, which costs nothing to latents below the limit.
    """
    preset = config.preset
    if config.target_l0 is None:
        cost = torch.zeros_like(rates) + coefficient
    else:
        cost = (rates.sum() / config.target_l0 - 1).mul(2 * coefficient / config.target_l0).expand_as(rates)
    if preset.frequency_limit is None:
        return cost
    excess = (rates / preset.frequency_limit - 1).clamp(min=0)
    return cost + excess * (2 * preset.frequency_coefficient / preset.frequency_limit)
