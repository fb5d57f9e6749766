"""The language model's loss on next tokens, and how far its predictions move, with one rule for what counts.

Position t counts if and only if token t and its target, token t + 1, are both unmasked: the prediction of EOS, and whatever
is predicted from BOS, EOS, padding or a prefix, stay out.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.base.errors import NonFinite

CHUNK_LOGITS = {"cpu": 1 << 20}
"""Logits whose log-softmax is taken at once, by type of device [numbers]. On CPUs a chunk and its temporaries stay in the
cache: at 2^25 the same takes 5 to 8 times as long, half of it in page faults."""
LARGE_CHUNK_LOGITS = 1 << 25
"""The same on all other devices, where a chunk is a few kernels; bounds memory at large vocabularies."""

Logits = Float[Tensor, "batch ctx vocab"]
Ids = Int[Tensor, "batch ctx"]
Mask = Bool[Tensor, "batch ctx"]


def counted_positions(mask: Mask) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Block and position of everything that counts for the loss, in order."""
    block, position = (mask[:, :-1] & mask[:, 1:]).nonzero(as_tuple=True)
    return block, position


def next_token_losses(logits: Logits, input_ids: Ids, mask: Mask, what: str = "the language model") -> Float[Tensor, " n"]:
    """The loss [nats] at each position that counts, in order, in float32; NonFinite, which names `what`, for NaN or infinity."""
    losses = [
        _losses(logits[block, position].float().log_softmax(-1), input_ids[block, position + 1])
        for block, position in _chunks(logits, mask)
    ]
    return _finite(torch.cat(losses) if losses else torch.empty(0, device=logits.device), what)


def losses_and_divergences(
    logits: Logits, clean: Logits, input_ids: Ids, mask: Mask, what: str = "the language model"
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The losses of `logits` and KL(clean || logits) [nats] at each position that counts; raises as `next_token_losses`."""
    losses, divergences = [], []
    for block, position in _chunks(logits, mask):
        log_q = logits[block, position].float().log_softmax(-1)
        losses.append(_losses(log_q, input_ids[block, position + 1]))
        divergences.append(kl_divergence(clean[block, position].float().log_softmax(-1), log_q))
    if not losses:
        return torch.empty(0, device=logits.device), torch.empty(0, device=logits.device)
    return _finite(torch.cat(losses), what), _finite(torch.cat(divergences), what)


def kl_divergence(log_p: Float[Tensor, "*rows vocab"], log_q: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """KL(p || q) [nats], as the sum of q - p - p (log q - log p).

    That is the sum of p (log p - log q), for p and q sum to one. Each of its summands is at least 0, so that a small
    divergence is no difference of large numbers; the clamp takes away what rounding leaves below 0.
    """
    p, ratio = log_p.exp(), log_q - log_p
    return log_q.exp().sub_(p).sub_(ratio.mul_(p)).clamp_(min=0).sum(-1)


def _losses(log_q: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log q of each row's target."""
    return -log_q.gather(1, targets.long()[:, None])[:, 0]


def _chunks(logits: Logits, mask: Mask) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """The positions that count, as many at a time as the device's chunk allows."""
    block, position = counted_positions(mask)
    rows = max(1, CHUNK_LOGITS.get(logits.device.type, LARGE_CHUNK_LOGITS) // logits.shape[-1])
    return zip(block.split(rows), position.split(rows), strict=True) if len(block) else iter(())


def _finite(values: Float[Tensor, " n"], what: str) -> Float[Tensor, " n"]:
    if not torch.isfinite(values.sum(dtype=torch.float64)):
        raise NonFinite(f"{what}: logits are NaN or infinite; run the model in float32, or check the SAE that is spliced in")
    return values
