"""The language model's loss on next tokens, and how far its predictions move, with one rule for what counts.

Position t counts if and only if token t and its target, token t + 1, are both unmasked: the prediction of EOS, and whatever
is predicted from BOS, EOS, padding or a prefix, stay out.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from everyscope.base.errors import NonFinite
from everyscope.evaluate.loss_kernels import losses_and_divergences_of, losses_of, normalisers_of

CHUNK_LOGITS = 1 << 25
"""Logits whose log-softmax is taken at once where there are no kernels for it [numbers]; bounds memory at large vocabularies."""

Logits = Float[Tensor, "batch ctx vocab"]
Ids = Int[Tensor, "batch ctx"]
Mask = Bool[Tensor, "batch ctx"]


def counted_positions(mask: Mask) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Block and position of everything that counts for the loss, in order."""
    block, position = (mask[:, :-1] & mask[:, 1:]).nonzero(as_tuple=True)
    return block, position


@dataclass(frozen=True)
class Predictions:
    """The logits of the untouched model, with what every comparison with them needs."""

    logits: Logits
    normalisers: tuple[np.ndarray, np.ndarray] | None
    """Largest logit and logarithm of the sum of exp(logit - largest) of each row, on the CPU; None elsewhere."""

    @classmethod
    def of(cls, logits: Logits) -> "Predictions":
        """Those of `logits`."""
        if logits.device.type != "cpu":
            return cls(logits, None)
        rows = _rows(logits)
        tops, log_sums = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
        _side_by_side(len(rows), lambda start, stop: normalisers_of(rows, start, stop, tops, log_sums))
        return cls(logits, (tops, log_sums))


def next_token_losses(logits: Logits, input_ids: Ids, mask: Mask, what: str = "the language model") -> Float[Tensor, " n"]:
    """The loss [nats] at each position that counts, in order, in float32; NonFinite, which names `what`, for NaN or infinity."""
    if logits.device.type == "cpu":
        rows, at, targets, losses = _rows(logits), *_places(input_ids, mask)
        _side_by_side(len(at), lambda start, stop: losses_of(rows, at, targets, start, stop, losses))
        return _finite(torch.from_numpy(losses), what)
    found = [
        _losses(logits[block, position].float().log_softmax(-1), input_ids[block, position + 1])
        for block, position in _chunks(logits, mask)
    ]
    return _finite(torch.cat(found) if found else torch.empty(0, device=logits.device), what)


def losses_and_divergences(
    logits: Logits, clean: Predictions, input_ids: Ids, mask: Mask, what: str = "the language model"
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The losses of `logits` and KL(clean || logits) [nats] at each position that counts; raises as `next_token_losses`."""
    if clean.normalisers is not None:
        known = (_rows(logits), _rows(clean.logits), *clean.normalisers)
        at, targets, found = _places(input_ids, mask)
        divergent = np.empty_like(found)
        _side_by_side(len(at), lambda start, stop: losses_and_divergences_of(*known, at, targets, start, stop, found, divergent))
        return _finite(torch.from_numpy(found), what), _finite(torch.from_numpy(divergent), what)
    losses, divergences = by_torch(logits, clean.logits, input_ids, mask)
    return _finite(losses, what), _finite(divergences, what)


def by_torch(logits: Logits, clean: Logits, input_ids: Ids, mask: Mask) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`losses_and_divergences` on devices for which there are no kernels, unchecked."""
    losses, divergences = [torch.empty(0, device=logits.device)], [torch.empty(0, device=logits.device)]
    for block, position in _chunks(logits, mask):
        log_q = logits[block, position].float().log_softmax(-1)
        losses.append(_losses(log_q, input_ids[block, position + 1]))
        divergences.append(kl_divergence(clean[block, position].float().log_softmax(-1), log_q))
    return torch.cat(losses), torch.cat(divergences)


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


def _rows(logits: Logits) -> Shaped[np.ndarray, "tokens vocab"]:
    """The logits as kernels take them: float32, or the bits of bfloat16."""
    flat = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.float().numpy()


def _places(input_ids: Ids, mask: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and target of everything that counts, and room for its losses."""
    block, position = counted_positions(mask)
    at = (block * mask.shape[1] + position).numpy()
    return at, input_ids[block, position + 1].long().numpy(), np.empty(len(at), np.float32)


def _side_by_side(count: int, work: Callable[[int, int], None]) -> None:
    """`work` on the ranges of 0 to `count`, one for each of torch's threads."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        work(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _chunks(logits: Logits, mask: Mask) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """The positions that count, as many at a time as CHUNK_LOGITS allows."""
    block, position = counted_positions(mask)
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    return zip(block.split(rows), position.split(rows), strict=True) if len(block) else iter(())


def _finite(values: Float[Tensor, " n"], what: str) -> Float[Tensor, " n"]:
    if not torch.isfinite(values.sum(dtype=torch.float64)):
        raise NonFinite(f"{what}: logits are NaN or infinite; run the model in float32, or check the SAE that is spliced in")
    return values
