"""How evenly the active latents of a token share in what it does for the prediction (Gemma Scope, arXiv 2408.05147, C.3).

A latent's share is its attribution y = f * (W_dec grad_x L), where L is the logit of the correct next token less the mean
logit, summed over all positions that count: what a token does for later ones is in its gradient too. With p = |y| / sum |y|,
exp of the entropy of p is the number of latents that matter; over the number that fire it is 1 where all matter equally.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.evaluate.losses import counted_positions
from everyscope.sae.kernels.cpu_codes import attribute


def centred_logits(
    logits: Float[Tensor, "batch ctx vocab"], input_ids: Int[Tensor, "batch ctx"], mask: Bool[Tensor, "batch ctx"]
) -> Float[Tensor, ""]:
    """Sum over the positions that count of the correct next token's logit less the mean logit."""
    block, position = counted_positions(mask)
    chosen = logits[block, position]
    correct = chosen.gather(1, input_ids[block, position + 1][:, None])[:, 0]
    return (correct.float() - chosen.mean(-1, dtype=torch.float32)).sum()


def attributions(
    f: Float[Tensor, "batch d_sae"], gradient: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, " firings"], Int[Tensor, " batch"]]:
    """Y = f * (W_dec grad_x L) of the latents that fire, row after row, and their number in each row."""
    if f.device.type != "cpu":
        fires = f > 0
        return (f.float() * (gradient.float() @ W_dec.float().T))[fires], fires.sum(1)
    y, firing = np.empty(int((f > 0).sum()), np.float32), np.empty(len(f), np.int64)
    codes, slopes, directions = (part.detach().float().contiguous().numpy() for part in (f, gradient, W_dec))
    attribute(codes, slopes, directions, y, firing)
    return torch.from_numpy(y), torch.from_numpy(firing)


def attribution_entropy(y: Float[Tensor, " firings"], firing: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Entropy of |y| / sum |y| over the latents that fire on each row [nats], float64; NaN where their y are all zeros.

    `y` has the latents that fire, row after row, and `firing` their number in each. Of 16k latents 50 do: the rest add nothing.
    """
    sizes = y.abs().double()
    total, spread = (torch.segment_reduce(some, "sum", lengths=firing) for some in (sizes, torch.xlogy(sizes, sizes)))
    return total.log() - spread / total


@dataclass
class UniformitySums:
    """Sums over positions at which some latent fires and has an attribution."""

    count: Float[Tensor, ""]
    """Positions [tokens]."""
    entropies: Float[Tensor, ""]
    """Sum of entropies [nats]."""
    effective: Float[Tensor, ""]
    """Sum of exp(entropy) [latents]."""
    ratios: Float[Tensor, ""]
    """Sum of exp(entropy) / number of latents that fire."""

    @classmethod
    def start(cls) -> Self:
        """Empty sums, on the CPU."""
        return cls(*(torch.zeros((), dtype=torch.float64) for _ in fields(cls)))

    def update(
        self, f: Float[Tensor, "batch d_sae"], gradient: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> None:
        """Add unmasked rows. Those without any attribution, as the last of a block, which predicts nothing, are left out."""
        y, firing = attributions(f, gradient, W_dec)
        entropy = attribution_entropy(y, firing)
        is_used = ~entropy.isnan()
        entropy, firing = entropy[is_used], firing[is_used]
        self.count += len(entropy)
        self.entropies += entropy.sum().cpu()
        self.effective += entropy.exp().sum().cpu()
        self.ratios += (entropy.exp() / firing).sum().cpu()

    def as_json(self) -> dict[str, Any] | None:
        """Means over positions; None where there is none."""
        count = int(self.count)
        if not count:
            return None
        return {
            "r_l0": float(self.ratios) / count,
            "entropy": float(self.entropies) / count,
            "effective": float(self.effective) / count,
            "num_positions": count,
        }
