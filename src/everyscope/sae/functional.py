"""The JumpReLU SAE as formulas, each in one place (Gemma Scope, arXiv 2408.05147; JumpReLU, arXiv 2407.14435).

Row vectors throughout. Training works on x = x_raw / scale, where E||x||^2 = 1: bandwidth and sparsity coefficient mean
nothing without it. An SAE reconstructs its own input, from which b_dec is subtracted first. A transcoder predicts a target y,
scaled likewise; its b_dec is of the target and touches no input, and a skip x @ w_skip may stand beside its latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def pre_activations(
    x: Float[Tensor, "*batch d_in"], W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """X @ W_enc + b_enc. In training x comes with b_dec already subtracted (the pre-encoder bias)."""
    return linear(x, W_enc.T, b_enc)  # adds the bias within the product: one pass less over [batch, d_sae]


def jumprelu(pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Where pre > threshold (strictly), pre itself, else 0. Nothing negative passes, as in the released SAEs."""
    return pre.relu() * (pre > threshold)


def largest(f: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """The k largest latents of each row, the others 0 (TopK, arXiv 2406.04093); of equal ones, any."""
    values, latents = f.topk(min(k, f.shape[-1]), dim=-1)
    return torch.zeros_like(f).scatter(-1, latents, values)


def decode(
    f: Float[Tensor, "*batch d_sae"], W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"]
) -> Float[Tensor, "*batch d_out"]:
    """The reconstruction f @ W_dec + b_dec."""
    return linear(f, W_dec.T, b_dec)


@dataclass(frozen=True)
class Gradients:
    """The loss's gradient by each of the parameter tensors, with the two terms of the loss and the latents' firing."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    reconstruction_loss: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Float[Tensor, " d_sae"]
    """Rows on which each latent is active."""
    pairs: Float[Tensor, ""]
    """Mean number of latents per row that are active or within half a bandwidth of their threshold."""
    w_skip: Float[Tensor, "d_in d_out"] | None = None
    """None where there is no skip."""


def loss_gradients(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_out"],
    threshold: Float[Tensor, " d_sae"],
    w_skip: Float[Tensor, "d_in d_out"] | None = None,
    *,
    target: Float[Tensor, "batch d_out"] | None = None,
    is_transcoder: bool = False,
    penalty: Callable[[Float[Tensor, " d_sae"]], Float[Tensor, " d_sae"]],
    bandwidth: float,
    prefixes: Sequence[int] = (),
) -> Gradients:
    """Gradients of mean ||y - y_hat||^2 plus sparsity terms over the batch, in closed form.

    y is `target`, or x where there is none. Of an SAE the encoder sees x - b_dec, of a transcoder x.

    `penalty` gives the sparsity terms' derivative by the latents' firing rates, given those. With `prefixes`, ends of nested
    dictionaries of which the last is d_sae (Matryoshka, arXiv 2503.17547), the first term is its mean over the prefixes' own
    reconstructions, each with the skip; the loss reported is that of all latents.

    Straight-through estimates reach the threshold alone, through a box kernel of width `bandwidth` on the pre-activation
    (arXiv 2407.14435, eq. 10 to 12): d jumprelu / d threshold = -(threshold / bandwidth) K, d step / d threshold =
    -(1 / bandwidth) K. The sparsity terms therefore send nothing to the encoder. Dense: five products [batch, d_in, d_sae].
    """
    rows, width = x.shape[0], len(threshold)
    encoded, wanted = x if is_transcoder else x - b_dec, without_skip(x, x if target is None else target, w_skip)
    code = forward(encoded, wanted, W_enc, W_dec, b_enc, b_dec, threshold, bandwidth, prefixes or (width,))
    fired = code.active.sum(0)
    pairs = torch.maximum(code.active, code.near).sum() / rows
    reconstruction_loss = code.errors[-1].square().sum() / rows
    d_W_enc, d_W_dec, d_b_enc, d_threshold, d_b_dec, d_y_hat = backward(
        code, code.errors, W_dec, threshold, penalty(fired / rows), bandwidth, prefixes or (width,), rows
    )
    return Gradients(
        W_enc=d_W_enc.T,  # in the layout of W_enc, which is stored by latent
        W_dec=d_W_dec,
        b_enc=d_b_enc,
        b_dec=d_b_dec if is_transcoder else d_b_dec - W_enc @ d_b_enc,
        threshold=d_threshold,
        reconstruction_loss=reconstruction_loss,
        l0=fired.sum() / rows,
        fired=fired,
        pairs=pairs,
        w_skip=None if w_skip is None else x.T @ d_y_hat,
    )


def without_skip(
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    w_skip: Float[Tensor, "d_in d_out"] | None,
    out: Float[Tensor, "batch d_out"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """What is left of the target for latents and bias: y - x @ w_skip; in `out`, if there is a skip and that is given."""
    return target if w_skip is None else torch.addmm(target, x, w_skip, alpha=-1, out=out)


@dataclass(frozen=True)
class Code:
    """A training step up to the errors of the reconstructions."""

    centred: Float[Tensor, "batch d_in"]
    """What the encoder sees."""
    f: Float[Tensor, "batch d_sae"]
    active: Float[Tensor, "batch d_sae"]
    """1 where a latent is active, else 0."""
    near: Float[Tensor, "batch d_sae"]
    """1 where its pre-activation is within half a bandwidth of its threshold, else 0."""
    errors: list[Float[Tensor, "batch d_out"]]
    """y_hat^k - y for each prefix k."""


def forward(
    centred: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_out"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    prefixes: Sequence[int],
    is_first: bool = True,
) -> Code:
    """The first half of `loss_gradients`: what the encoder sees, and what latents and bias are to give.

    Of a shard of latents, errors are its part; b_dec - target is in that of the first alone.
    """
    pre = pre_activations(centred, W_enc, b_enc)
    # Masks as numbers, written straight into a float tensor: a product with a bool tensor takes five times as long on CPUs.
    active = torch.gt(pre, threshold, out=torch.empty_like(pre))
    near = torch.lt((pre - threshold).abs_(), bandwidth / 2, out=torch.empty_like(pre))
    f = pre.mul_(active)
    errors = [b_dec - target if is_first else torch.zeros_like(target)]
    for start, stop in pairwise((0, *prefixes)):
        errors.append(torch.addmm(errors[-1], f[:, start:stop], W_dec[start:stop]))
    return Code(centred, f, active, near, errors[1:])


def backward(
    code: Code,
    errors: Sequence[Float[Tensor, "batch d_out"]],
    W_dec: Float[Tensor, "d_sae d_out"],
    threshold: Float[Tensor, " d_sae"],
    cost: Float[Tensor, " d_sae"],
    bandwidth: float,
    prefixes: Sequence[int],
    batch: int,
    into: Sequence[Tensor | None] = (None,) * 5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The second half: gradients by W_enc [d_sae d_in], W_dec, b_enc, threshold, the bias of reconstructions, and these.

    `errors` are those of all latents, `cost` the sparsity terms' derivative by firing rates, `batch` the rows of means. To b_dec
    also goes, through an SAE's pre-encoder bias, -W_enc @ d_b_enc. `into` gives all but the last memory; None takes new. It
    consumes `code`. The last, [batch d_out], is by what all prefixes share: bias and skip.
    """
    spans = list(pairwise((0, *prefixes)))
    into_W_enc, into_W_dec, into_b_enc, into_threshold, into_b_dec = into
    d_W_dec = torch.empty_like(W_dec) if into_W_dec is None else into_W_dec
    d_x_hat, d_f = torch.zeros_like(errors[0]), torch.empty_like(code.f)
    for (start, stop), error in reversed(list(zip(spans, errors, strict=True))):
        d_x_hat.add_(error, alpha=2 / (batch * len(spans)))  # each group of latents serves its own prefix and all longer ones
        torch.mm(d_x_hat, W_dec[start:stop].T, out=d_f[:, start:stop])
        torch.mm(code.f[:, start:stop].T, d_x_hat, out=d_W_dec[start:stop])
    sparsity = code.near.sum(0).mul_(cost / batch)
    d_threshold = (d_f * code.near).sum(0).mul_(threshold).add_(sparsity).mul_(-1 / bandwidth)
    if into_threshold is not None:
        d_threshold = into_threshold.copy_(d_threshold)
    d_pre = d_f.mul_(code.active)
    d_b_enc = torch.sum(d_pre, 0, out=into_b_enc)
    d_W_enc = torch.mm(d_pre.T, code.centred, out=into_W_enc)
    return d_W_enc, d_W_dec, d_b_enc, d_threshold, torch.sum(d_x_hat, 0, out=into_b_dec), d_x_hat


def without_parallel_part(
    gradient: Float[Tensor, "d_sae d_out"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae d_out"]:
    """The decoder's gradient less its component along each latent's (unit) direction."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


def unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
    """Each latent's direction at norm one."""
    return W_dec / W_dec.norm(dim=1, keepdim=True)
