"""Several continuations of one prompt, with latents pushed by different amounts, in one batch.

Steering adds to the activations what pushing the latents adds to the reconstruction, decode(pushed) - decode(original): what the
SAE does not reconstruct stays as it was, and a push of 0 changes no bit. On a CPU nine rows take about twice as long as one,
because each token reads all weights once. Beside each steered row a row without pushes reads the same tokens, which gives the
unsteered model's view of what is written while it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.browse.live import Continuation, Push
from everyscope.sae.folded import Sae


def drawn(logits: Float[Tensor, "rows d_vocab"], temperature: float, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """A token for each row; the rows share their random numbers, so that equal distributions draw equal tokens.

    The token of largest probability over exponential noise is a draw from these probabilities.
    """
    if not temperature:
        return logits.argmax(-1)
    noise = torch.empty(logits.shape[-1]).exponential_(generator=generator)
    return ((logits / temperature).softmax(-1) / noise).argmax(-1)


@dataclass(frozen=True)
class Batch:
    """Which row writes which column: row 0 unsteered, then the steered rows, then for each of these a row that reads along."""

    row_of: tuple[int, ...]
    """Of each column."""
    num_written: int
    """Rows that write, row 0 and the steered ones."""
    strengths: dict[str, dict[int, list[float]]]
    """By SAE and latent, the push in each row [raw units]."""

    @classmethod
    def of(cls, columns: Sequence[Sequence[Push]]) -> "Batch":
        """Columns that push nothing share row 0."""
        is_steered = [any(push.strength for push in pushes) for pushes in columns]
        row_of = [sum(is_steered[: place + 1]) if steered else 0 for place, steered in enumerate(is_steered)]
        num_written = 1 + sum(is_steered)
        strengths: dict[str, dict[int, list[float]]] = {}
        for row, pushes in zip(row_of, columns, strict=True):
            for push in pushes if row else ():
                rows = strengths.setdefault(push.sae_id, {}).setdefault(push.latent, [0.0] * (2 * num_written - 1))
                rows[row] += push.strength
        return cls(tuple(row_of), num_written, strengths)

    @property
    def num_rows(self) -> int:
        """All of them."""
        return 2 * self.num_written - 1

    def beside(self, row: int) -> int:
        """The row without pushes that reads what `row` writes."""
        return row and row + self.num_written - 1


class Column:
    """One continuation as it is written."""

    def __init__(self) -> None:
        """Empty."""
        self.tokens: list[int] = []
        self.is_open = True
        self._kl = self._log_probability = 0.0

    def add(self, token: int, own: Float[Tensor, " d_vocab"], unsteered: Float[Tensor, " d_vocab"], eos: int | None) -> None:
        """Append a token, given the log-probabilities it was drawn from and the unsteered model's; end before EOS."""
        self.is_open = self.is_open and token != eos
        if self.is_open:
            self.tokens.append(token)
            self._kl += max(0.0, float((own.exp() * (own - unsteered)).sum()))
            self._log_probability += float(unsteered[token])

    def told(self, pieces: Sequence[bytes]) -> Continuation:
        """With the bytes of every token of the vocabulary, `pieces`."""
        count = len(self.tokens)
        tokens = tuple(pieces[token] for token in self.tokens)
        return Continuation(tokens, self._kl / count if count else None, self._log_probability / count if count else None)


@dataclass(frozen=True)
class Pushed:
    """Latents of one SAE to push."""

    sae: Sae
    """With these latents alone, where the others do not matter to them."""
    latents: list[int]
    """Their places in `sae`."""
    strengths: Float[Tensor, "batch 1 n_latents"]
    """What is added to each in each row [raw units]."""

    @classmethod
    def of(cls, sae: Sae, by_latent: dict[int, list[float]]) -> "Pushed":
        """By latent its pushes in each row; a TopK SAE stays whole, because its latents compete."""
        latents, strengths = list(by_latent), torch.tensor(list(by_latent.values())).T[:, None]
        if sae.top_k is not None:
            return cls(sae, latents, strengths)
        chosen = sae.with_tensors(
            W_enc=sae.W_enc[:, latents],
            b_enc=sae.b_enc[latents],
            threshold=sae.threshold[latents],
            W_dec=sae.W_dec[latents],
        )
        return cls(chosen, list(range(len(latents))), strengths)


def pushed(
    x: Float[Tensor, "batch ctx d_in"], written: Float[Tensor, "batch ctx d_out"] | None = None, *, pushes: Sequence[Pushed]
) -> Float[Tensor, "batch ctx d_out"]:
    """Activations x to x + decode(f') - decode(f), where f' is their code f with strengths added to it, and never below 0.

    Of transcoders, that is added to what is `written` behind what they read.
    """
    total = x if written is None else written
    for push in pushes:
        f = push.sae.encode(x)[..., push.latents]
        moved = (f + push.strengths).clamp(min=0) - f
        total = total + (moved @ push.sae.W_dec[push.latents]).to(x)
    return total
