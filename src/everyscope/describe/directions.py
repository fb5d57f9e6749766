"""What follows from the decoder alone: the tokens that a latent writes, and the latents that point the same way."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow
import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.describe import columns
from everyscope.describe.lens import Lens
from everyscope.describe.targets import SAME
from everyscope.sae.folded import Sae
from everyscope.sites.logits import LogitPath

CHUNK_NUMBERS = 1 << 24
"""Cosines held at once [numbers]; bounds memory at large widths."""
TOP_LOGITS = 10
"""Tokens kept at each end [tokens]."""


@torch.no_grad()
def logit_columns(
    path: LogitPath, lens: Lens, W_dec: Float[Tensor, "latents d_in"], *, has_raw: bool
) -> dict[str, pyarrow.Array]:
    """The strongest and weakest tokens of each direction, with the norms' gains and, where `has_raw`, without them.

    `lens` is of the unembedding on `path`. The raw columns are empty lists where they are not wanted.
    """
    found = {}
    for prefix, of_directions in (("", path.through_norms), ("raw_", path.raw if has_raw else None)):
        if of_directions is not None:
            ends = lens.ends(of_directions(W_dec), TOP_LOGITS)
            tokens, values = ends.tokens, columns.rounded(ends.values)
        else:
            tokens, values = np.empty((len(W_dec), 2, 0), np.int32), np.empty((len(W_dec), 2, 0), np.float32)
        for end, name in enumerate((f"{prefix}top_logits", f"{prefix}bottom_logits")):
            found[name] = columns.ranked(name, tokens[:, end], value=values[:, end])
    return found


@torch.no_grad()
def neighbour_column(
    W_dec: Float[Tensor, "latents d_in"], first: int, relatives: Sequence[tuple[int, int]], others: Mapping[int, Sae], count: int
) -> pyarrow.Array:
    """For latents from `first` on, the `count` of each relative (relation, number) whose decoder rows are nearest by cosine.

    In the same SAE a latent is not its own neighbour. Nearest first; a latent without direction has cosine 0 with all.
    """
    parts = [_nearest(W_dec, others[number].W_dec, count, first if relation == SAME else None) for relation, number in relatives]
    latents = np.concatenate([latent for latent, _ in parts], axis=1)
    widths = [latent.shape[1] for latent, _ in parts]
    relation = np.repeat([relation for relation, _ in relatives], widths)
    number = np.repeat([number for _, number in relatives], widths)
    counts = np.full(len(W_dec), latents.shape[1])
    fields = {
        "relation": np.tile(relation, len(W_dec)).astype(np.int8),
        "sae": np.tile(number, len(W_dec)).astype(np.int32),
        "latent": latents.ravel(),
        "cosine": columns.rounded(np.concatenate([cosine for _, cosine in parts], axis=1).ravel()),
    }
    return columns.structs("neighbours", counts, fields)


def _nearest(
    rows: Float[Tensor, "n d_in"], others: Float[Tensor, "m d_in"], count: int, own: int | None
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The nearest rows of `others` and their cosines; `own`, where given, is the index there of the first of `rows`."""
    others = torch.nn.functional.normalize(others, dim=1)
    kept = min(count, len(others) - (own is not None))
    chunk = max(1, CHUNK_NUMBERS // len(others))
    latents, cosines = [], []
    for start in range(0, len(rows), chunk):
        cosine = torch.nn.functional.normalize(rows[start : start + chunk], dim=1) @ others.T
        if own is not None:
            here = torch.arange(len(cosine), device=cosine.device)
            cosine[here, here + own + start] = -torch.inf
        top = cosine.topk(kept, dim=1)
        latents.append(top.indices.cpu().numpy())
        cosines.append(top.values.cpu().numpy())
    return np.concatenate(latents), np.concatenate(cosines)
