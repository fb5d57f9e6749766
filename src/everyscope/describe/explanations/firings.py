"""Exact activations of many SAEs over all passages, from one pass of the model for as many SAEs as fit in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from everyscope.describe.codes import LatentCodes, encode_rows, joined
from everyscope.describe.explanations.passages import Passages, Windows
from everyscope.sae.folded import Sae
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.capture import capture
from everyscope.sites.names import Site, places_of


@dataclass(frozen=True)
class Firings:
    """Where each latent of an SAE fires: its pairs lie side by side, in order of token. Tokens that do not count have none."""

    starts: Int[np.ndarray, " d_sae_plus_1"]
    tokens: Int[np.ndarray, " n_pairs"]
    activations: Float[np.ndarray, " n_pairs"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.starts) - 1

    def of(self, latent: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The tokens on which a latent fires, and how strongly."""
        stretch = slice(self.starts[latent], self.starts[latent + 1])
        return self.tokens[stretch], self.activations[stretch]

    def num_tokens(self) -> Int[np.ndarray, " d_sae"]:
        """Tokens on which each latent fires [tokens]."""
        return np.diff(self.starts)


@torch.no_grad()
def collect_firings(
    model: Any, saes: Sequence[tuple[Site, Sae, NormLimits]], passages: Passages, batch_blocks: int, done: Callable[[int], None]
) -> list[Firings]:
    """The firings of each SAE over all counting tokens; `done` is called with blocks passed. The SAEs lie on the model's device.

    On rows whose norm is above a limit of an SAE it has no firings: it was not trained on them, and all its latents fire there.
    """
    places = places_of(site for site, _, _ in saes)
    parts: list[list[LatentCodes]] = [[] for _ in saes]
    ctx = passages.input_ids.shape[1]
    for start in range(0, len(passages.input_ids), batch_blocks):
        ids = torch.from_numpy(passages.input_ids[start : start + batch_blocks]).long()
        mask = torch.from_numpy(passages.mask[start : start + batch_blocks])
        tokens = np.flatnonzero(mask.numpy().ravel()) + start * ctx
        found = capture(model, places, ids)
        rows = {place: found[place][mask.to(found[place].device)] for place in places}
        for part, (site, sae, limits) in zip(parts, saes, strict=True):
            read = rows[site.inputs[0]]
            usual = ~limits.massive(read, rows[site.outputs[0]])
            part.append(encode_rows(sae, read[usual], tokens[usual.cpu().numpy()]))
        done(len(ids))
    return [Firings(codes.starts, codes.places, codes.values) for codes in map(joined, parts)]


def window_peaks(firings: Firings, windows: Windows, latent: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The windows in which a latent fires, in order, and its largest activation in each."""
    tokens, activations = firings.of(latent)
    window = windows.of_token[tokens]
    window, activations = window[window >= 0], activations[window >= 0]
    first = np.flatnonzero(np.diff(window, prepend=-1))
    return window[first], np.maximum.reduceat(activations, first) if len(first) else activations
