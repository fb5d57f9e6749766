"""Thresholds that are set rather than learned: where they begin, and while a run's first phase holds L0 at its target."""

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.functional import pre_activations
from everyscope.sae.mesh import ALONE, Axis, Collective
from everyscope.sae.trainable import StepLosses, TrainableSae

PRODUCTS = 2**24
"""Pre-activations that an initial quantile is taken from, at most."""
DAMPING = 0.5
"""Share of a Newton step that is taken: the batch's L0 is noisy, and directions move at the same time [1]."""
REVIVAL = 0.97
"""What a step multiplies a silent latent's threshold by [1]."""
LARGEST_MOVE = 0.2
"""A step moves thresholds by at most this share of their mean [1]."""
LEAST_VARIANCE = 0.3
"""Of the mean variance, what is added to each coordinate's before encoders are weighed by it [1]."""


@torch.no_grad()
def warm_start(
    sae: TrainableSae,
    x: Float[Tensor, "batch d_in"],
    collective: Collective = ALONE,
    target: Float[Tensor, "batch d_out"] | None = None,
) -> None:
    """Set b_dec to the mean of normalised rows `x`, and all thresholds to the value that target_l0 latents of a row exceed.

    Of a transcoder, b_dec becomes the mean of the `target` rows.

    Before, where the preset lets encoders follow, W_enc is weighed by `coordinate_weights` of these rows.

    Of several ranks each gives its own rows; the mean and the quantile are those of all rows and all latents.
    """
    p, config = sae.parameters, sae.config
    x = _gathered(x, "replicas", collective)
    p["b_dec"].copy_((x if target is None else _gathered(target, "replicas", collective)).mean(0))
    if config.preset.encoder_follows:
        sae.coordinate_weights.copy_(coordinate_weights(x))
        p["W_enc"].copy_((p["W_dec"] * sae.coordinate_weights).T.mul(config.preset.encoder_scale))
    if config.target_l0 is not None:
        rows = x[: max(1, PRODUCTS // config.width)]
        pre = pre_activations(sae.seen(rows), p["W_enc"], p["b_enc"]).flatten()
        rank = min(len(rows) * config.width, max(1, round(config.target_l0 * len(rows))))
        largest = pre.topk(min(rank, len(pre))).values
        if collective.mesh.shards > 1:  # the rank-th largest of all is among the largest of each shard
            padded = torch.cat([largest, largest.new_full((rank - len(largest),), -torch.inf)])
            largest = _gathered(padded, "shards", collective).topk(rank).values
        p["threshold"].fill_(largest[-1].clamp(min=config.preset.initial_threshold))


def coordinate_weights(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " d_in"]:
    """The inverse root of each coordinate's variance over rows `x`, at mean 1: as a whitening would, of which it is the diagonal.

    A direction's part in coordinates that vary much tells little of whether a row holds it. LEAST_VARIANCE keeps coordinates that
    hardly vary, or not in this batch, from ruling all.
    """
    variance = x.var(0, correction=0)
    weights = (variance + LEAST_VARIANCE * variance.mean()).clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
    return weights / weights.mean()


def _gathered(part: Tensor, axis: Axis, collective: Collective) -> Tensor:
    """Equal parts of all ranks on `axis`, one behind the other."""
    members = collective.mesh.members(axis)
    if len(members) == 1:
        return part
    whole = part.new_zeros(len(members), *part.shape)
    whole[members.index(collective.mesh.rank)] = part
    collective.sum_(whole, axis)
    return whole.flatten(0, 1)


@torch.no_grad()
def drive_thresholds(sae: TrainableSae, losses: StepLosses, steps: int | Tensor, collective: Collective = ALONE) -> None:
    """Move all thresholds by what brings L0 to its target, to first order: a Newton step, damped, on the pairs just seen.

    Latents that have been silent for the preset's revive_steps, of `steps` done (a number, or [] on the device), come down
    besides, until they fire.

    Pairs below their threshold fill half a bandwidth, so (pairs - L0) / (bandwidth / 2) is how much L0 falls per unit of
    threshold. Meanwhile latents compete as in BatchTopK (arXiv 2412.06410), whose common cut this is.
    """
    target, threshold = sae.config.target_l0, sae.parameters["threshold"]
    assert target is not None
    density = (losses.pairs - losses.l0) / (sae.config.preset.bandwidth / 2)
    limit = LARGEST_MOVE * _mean_of_latents(threshold, sae.config.width, collective)
    move = (DAMPING * (losses.l0 - target) / density.clamp(min=1e-6)).clamp(-limit, limit)
    threshold.add_(move).clamp_(min=0)
    if sae.config.preset.revive_steps is not None:
        threshold.mul_(torch.where(steps - sae.last_fired >= sae.config.preset.revive_steps, REVIVAL, 1.0))


def _mean_of_latents(values: Float[Tensor, " d_sae"], width: int, collective: Collective) -> Float[Tensor, ""]:
    """The mean over all shards' latents, `width` in all."""
    if collective.mesh.shards == 1:
        return values.mean()
    total = values.sum(dtype=torch.float64)
    collective.sum_(total, "shards")
    return (total / width).to(values.dtype)
