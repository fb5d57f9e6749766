"""What the ranks that train one SAE tell one another in a step, and the dense step cut where they must.

A shard holds a range of latents, a replica a part of the rows. Of all that a step computes, only the reconstruction needs all
latents of a row (errors, summed over shards), and only a parameter's gradient and a latent's firing rate need all rows of the
batch (summed over replicas). Everything else stays with the rank that made it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from everyscope.sae.functional import Gradients, backward, forward, without_skip
from everyscope.sae.mesh import Collective, of_all
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import sparsity_weight
from everyscope.sae.trainable import TENSORS, StepLosses, TrainableSae, move_along


@dataclass(frozen=True)
class Counts:
    """What was counted at all ranks; float64, so that counts are exact."""

    by_latent: Float64[Tensor, "kinds d_sae"]
    """Over the rows of all replicas, for the latents held here."""
    totals: Float64[Tensor, " kinds"]
    """The same over all latents."""
    squares: Float64[Tensor, ""]
    """Summed squared errors of all rows."""
    extra: Float64[Tensor, " numbers"]
    """Sums over all ranks."""


def counted(
    collective: Collective, by_latent: Shaped[Tensor, "kinds d_sae"], squares: Tensor, extra: Shaped[Tensor, " numbers"]
) -> Counts:
    """Add up what each rank counted on its rows, `by_latent` and `squares`, which all shards see alike; and `extra` numbers.

    Two sums, over replicas and over shards, however many numbers there are.
    """
    kinds, width = by_latent.shape
    rows = torch.cat([by_latent.flatten().double(), squares.reshape(1).double(), extra.double()])
    collective.sum_(rows, "replicas")
    summed = rows[: kinds * width].view(kinds, width)
    latents = torch.cat([summed.sum(1), rows[kinds * width + 1 :]])
    collective.sum_(latents, "shards")
    return Counts(summed, latents[:kinds], rows[kinds * width], latents[kinds:])


def shared_penalty(
    sae: TrainableSae, step: int, fired: Float64[Tensor, " d_sae"], all_fired: Float64[Tensor, ""], batch: int
) -> Float[Tensor, " d_sae"]:
    """`objective.penalty` of the latents held here, which fired on so many of `batch` rows; `all_fired` counts all shards'.

    What others' latents have to do with it is their share of L0 alone: they stand in as one latent more, which is then left out.
    """
    rates = torch.cat([fired, (all_fired - fired.sum())[None]]) / batch
    cost = penalty(sae.config, sparsity_weight(sae.config, step), rates)[:-1]
    return cost.to(sae.parameters["threshold"].dtype).contiguous()


def largest(collective: Collective, value: Tensor) -> Tensor:
    """The largest of all ranks' numbers, the same on each."""
    return of_all(collective, value).max()


def shared_gradients(
    sae: TrainableSae, x: Float[Tensor, "batch d_in"], step: int, collective: Collective, target: Float[Tensor, "batch d_out"]
) -> tuple[Gradients, Float64[Tensor, ""]]:
    """`functional.loss_gradients` of the latents held here, over the rows of all replicas, of which `x` and `target` are this
    one's.

    With it the largest share of pairs among all (row, latent) of a rank. Losses, l0 and pairs are of all latents and rows.
    """
    mesh, p, bandwidth = collective.mesh, sae.parameters, sae.config.preset.bandwidth
    batch, w_skip, is_first = len(x) * mesh.replicas, p.get("w_skip"), mesh.shard == 0
    left = without_skip(x, target, w_skip) if is_first else target  # other shards' errors are without the target
    own = {name: p[name] for name in TENSORS}
    code = forward(sae.seen(x), left, **own, bandwidth=bandwidth, prefixes=sae.prefixes, is_first=is_first)
    by_latent = torch.stack([code.active.sum(0), torch.maximum(code.active, code.near).sum(0)])
    errors = torch.stack(code.errors)
    collective.sum_(errors, "shards")
    pair_share = torch.zeros(mesh.ranks, dtype=torch.float64, device=x.device)
    pair_share[mesh.rank] = by_latent[1].sum() / code.active.numel()
    counts = counted(collective, by_latent, errors[-1].square().sum(), pair_share)
    fired = counts.by_latent[0].to(x.dtype)
    cost = shared_penalty(sae, step, counts.by_latent[0], counts.totals[0], batch)
    # All gradients that replicas add up lie in one piece of memory.
    by_part = [
        p["W_enc"].T,
        *(p[name] for name in ("W_dec", "b_enc", "threshold", "b_dec")),
        *([] if w_skip is None else [w_skip]),
    ]
    flat = x.new_empty(sum(part.numel() for part in by_part))
    parts = [part.view(like.shape) for part, like in zip(flat.split([part.numel() for part in by_part]), by_part, strict=True)]
    d_W_enc, d_W_dec, d_b_enc, d_threshold, d_b_dec, d_y_hat = backward(
        code, list(errors), p["W_dec"], p["threshold"], cost, bandwidth, sae.prefixes, batch, parts[:5]
    )
    d_w_skip = None if w_skip is None else torch.mm(x.T, d_y_hat, out=parts[5])
    collective.sum_(flat, "replicas")
    if not sae.is_transcoder:
        from_latents = p["W_enc"] @ d_b_enc
        collective.sum_(from_latents, "shards")
        d_b_dec = d_b_dec - from_latents
    losses = ((number / batch).to(x.dtype) for number in (counts.squares, *counts.totals))
    reconstruction, l0, pairs = losses
    gradients = Gradients(d_W_enc.T, d_W_dec, d_b_enc, d_b_dec, d_threshold, reconstruction, l0, fired, pairs, d_w_skip)
    return gradients, counts.extra.max()


@torch.no_grad()
def shared_dense_update(
    sae: TrainableSae,
    x: Float[Tensor, "batch d_in"],
    step: int,
    steps: int,
    collective: Collective,
    target: Float[Tensor, "batch d_out"] | None = None,
) -> tuple[StepLosses, Float64[Tensor, ""]]:
    """`dense_update` on this rank's rows and latents, with the largest share of pairs that a rank has."""
    gradients, pair_share = shared_gradients(sae, x, step, collective, x if target is None else target)
    return move_along(sae, gradients, step, steps), pair_share
