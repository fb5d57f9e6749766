"""The JumpReLU SAE as formulas, each in one place (Gemma Scope, arXiv 2408.05147; JumpReLU, arXiv 2407.14435).

Row vectors throughout. Training works on x = x_raw / scale, where E||x||^2 = 1: bandwidth and sparsity coefficient mean
nothing without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def pre_activations(
    x: Float[Tensor, "*batch d_in"], w_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """X @ w_enc + b_enc. In training x comes with b_dec already subtracted (the pre-encoder bias)."""
    return linear(x, w_enc.T, b_enc)  # adds the bias within the product: one pass less over [batch, d_sae]


def jumprelu(pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Where pre > threshold (strictly), pre itself, else 0. Nothing negative passes, as in the released SAEs."""
    return pre.relu() * (pre > threshold)


def decode(
    f: Float[Tensor, "*batch d_sae"], w_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"]
) -> Float[Tensor, "*batch d_in"]:
    """The reconstruction f @ w_dec + b_dec."""
    return linear(f, w_dec.T, b_dec)


@dataclass(frozen=True)
class Gradients:
    """The loss's gradient by each of the five parameter tensors, with the two terms of the loss and the latents' firing."""

    w_enc: Float[Tensor, "d_in d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]
    reconstruction_loss: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Float[Tensor, " d_sae"]
    """Rows on which each latent is active."""
    pairs: Float[Tensor, ""]
    """Mean number of latents per row that are active or within half a bandwidth of their threshold."""


def loss_gradients(
    x: Float[Tensor, "batch d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    w_dec: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"],
    *,
    penalty: Callable[[Float[Tensor, " d_sae"]], Float[Tensor, " d_sae"]],
    bandwidth: float,
    prefixes: Sequence[int] = (),
) -> Gradients:
    """Gradients of mean ||x - x_hat||^2 plus sparsity terms over the batch, in closed form.

    `penalty` gives the sparsity terms' derivative by the latents' firing rates, given those. With `prefixes`, ends of nested
    dictionaries of which the last is d_sae (Matryoshka, arXiv 2503.17547), the first term is its mean over the prefixes' own
    reconstructions; the loss reported is that of all latents.

    Straight-through estimates reach the threshold alone, through a box kernel of width `bandwidth` on the pre-activation
    (arXiv 2407.14435, eq. 10 to 12): d jumprelu / d threshold = -(threshold / bandwidth) K, d step / d threshold =
    -(1 / bandwidth) K. The sparsity terms therefore send nothing to the encoder. Dense: five products [batch, d_in, d_sae].
    """
    rows = x.shape[0]
    centred = x - b_dec
    pre = pre_activations(centred, w_enc, b_enc)
    # Masks as numbers, written straight into a float tensor: a product with a bool tensor takes five times as long on CPUs.
    active = torch.gt(pre, threshold, out=torch.empty_like(pre))
    near = torch.lt((pre - threshold).abs_(), bandwidth / 2, out=torch.empty_like(pre))
    pairs = torch.maximum(active, near).sum() / rows
    f = pre.mul_(active)
    errors, groups = [b_dec - x], list(pairwise((0, *(prefixes or (len(threshold),)))))
    for start, stop in groups:
        errors.append(torch.addmm(errors[-1], f[:, start:stop], w_dec[start:stop]))
    reconstruction_loss = errors[-1].square().sum() / rows
    d_x_hat, d_f, d_w_dec = torch.zeros_like(x), torch.empty_like(pre), torch.empty_like(w_dec)
    for (start, stop), error in reversed(list(zip(groups, errors[1:], strict=True))):
        d_x_hat.add_(error, alpha=2 / (rows * len(groups)))  # each group of latents serves its own prefix and all longer ones
        torch.mm(d_x_hat, w_dec[start:stop].T, out=d_f[:, start:stop])
        torch.mm(f[:, start:stop].T, d_x_hat, out=d_w_dec[start:stop])
    fired, close = active.sum(0), near.sum(0)
    sparsity = close.mul_(penalty(fired / rows) / rows)
    d_threshold = (d_f * near).sum(0).mul_(threshold).add_(sparsity).mul_(-1 / bandwidth)
    d_pre = d_f.mul_(active)
    d_b_enc = d_pre.sum(0)
    return Gradients(
        w_enc=(d_pre.T @ centred).T,  # in the layout of w_enc, which is stored by latent
        w_dec=d_w_dec,
        b_enc=d_b_enc,
        b_dec=d_x_hat.sum(0) - w_enc @ d_b_enc,
        threshold=d_threshold,
        reconstruction_loss=reconstruction_loss,
        l0=fired.sum() / rows,
        fired=fired,
        pairs=pairs,
    )


def without_parallel_part(
    gradient: Float[Tensor, "d_sae d_in"], w_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """The decoder's gradient less its component along each latent's (unit) direction."""
    return gradient - (gradient * w_dec).sum(1, keepdim=True) * w_dec


def unit_rows(w_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Each latent's direction at norm one."""
    return w_dec / w_dec.norm(dim=1, keepdim=True)
