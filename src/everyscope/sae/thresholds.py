"""Thresholds that are set rather than learned: where they begin, and while a run's first phase holds L0 at its target."""

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.functional import pre_activations
from everyscope.sae.trainable import StepLosses, TrainableSae

PRODUCTS = 2**24
"""Pre-activations that an initial quantile is taken from, at most."""
DAMPING = 0.5
"""Share of a Newton step that is taken: the batch's L0 is noisy, and directions move at the same time [1]."""
REVIVAL = 0.97
"""What a step multiplies a silent latent's threshold by [1]."""
LARGEST_MOVE = 0.2
"""A step moves thresholds by at most this share of their mean [1]."""


@torch.no_grad()
def warm_start(sae: TrainableSae, x: Float[Tensor, "batch d_in"]) -> None:
    """Set b_dec to the mean of normalised rows `x`, and all thresholds to the value that target_l0 latents of a row exceed."""
    p = sae.parameters
    p["b_dec"].copy_(x.mean(0))
    if sae.config.target_l0 is not None:
        rows = x[: max(1, PRODUCTS // sae.config.width)]
        pre = pre_activations(rows - p["b_dec"], p["w_enc"], p["b_enc"]).flatten()
        rank = min(len(pre), max(1, round(sae.config.target_l0 * len(rows))))
        p["threshold"].fill_(pre.topk(rank).values[-1].clamp(min=sae.config.recipe.initial_threshold))


@torch.no_grad()
def drive_thresholds(sae: TrainableSae, losses: StepLosses, steps: int) -> None:
    """Move all thresholds by what brings L0 to its target, to first order: a Newton step, damped, on the pairs just seen.

    Latents that have been silent for the recipe's revive_steps, of `steps` done, come down besides, until they fire.

    Pairs below their threshold fill half a bandwidth, so (pairs - L0) / (bandwidth / 2) is how much L0 falls per unit of
    threshold. Meanwhile latents compete as in BatchTopK (arXiv 2412.06410), whose common cut this is.
    """
    target, threshold = sae.config.target_l0, sae.parameters["threshold"]
    assert target is not None
    density = (losses.pairs - losses.l0) / (sae.config.recipe.bandwidth / 2)
    limit = LARGEST_MOVE * threshold.mean()
    move = (DAMPING * (losses.l0 - target) / density.clamp(min=1e-6)).clamp(-limit, limit)
    threshold.add_(move).clamp_(min=0)
    if sae.config.recipe.revive_steps is not None:
        threshold.mul_(torch.where(steps - sae.last_fired >= sae.config.recipe.revive_steps, REVIVAL, 1.0))
