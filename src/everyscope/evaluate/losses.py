"""The language model's loss on next tokens, with one rule for what counts.

Position t counts if and only if token t and its target, token t + 1, are both unmasked: the prediction of EOS, and whatever
is predicted from BOS, EOS, padding or a prefix, stay out.
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.base.errors import DataError, NonFinite

CHUNK_LOGITS = 1 << 25
"""Logits whose log-softmax is taken at once [numbers]; bounds memory at large vocabularies."""


@dataclass
class LossSums:
    """Summed next-token losses, held as tensors so that they can be saved exactly."""

    total: Float[Tensor, ""]
    """Summed loss, float64 [nats]."""
    count: Int[Tensor, ""]
    """Positions summed, int64 [tokens]."""

    @classmethod
    def start(cls) -> Self:
        """Empty sums, on the CPU."""
        return cls(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def update(self, losses: Float[Tensor, " n"]) -> None:
        """Add the losses of some positions; NonFinite where one is NaN or infinite."""
        total = losses.sum(dtype=torch.float64).cpu()
        if not torch.isfinite(total):
            raise NonFinite("the language model's loss is NaN or infinite; run the model in float32, or check the spliced SAE")
        self.total += total
        self.count += len(losses)

    @property
    def mean(self) -> float:
        """Mean loss [nats/token]; DataError where no position counted."""
        if not int(self.count):
            raise DataError("no position of the held-out text counts for the loss; give more text")
        return float(self.total) / int(self.count)


def next_token_losses(
    logits: Float[Tensor, "batch ctx vocab"], input_ids: Int[Tensor, "batch ctx"], mask: Bool[Tensor, "batch ctx"]
) -> Float[Tensor, " n"]:
    """The loss [nats] at each position that counts, in order: float32 log-softmax, a chunk of rows at a time."""
    counts = mask[:, :-1] & mask[:, 1:]
    block, position = counts.nonzero(as_tuple=True)
    targets = input_ids[block, position + 1]
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    chunks = [
        torch.nn.functional.cross_entropy(
            logits[block[start : start + rows], position[start : start + rows]].float(),
            targets[start : start + rows].long(),
            reduction="none",
        )
        for start in range(0, len(targets), rows)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, device=logits.device)
