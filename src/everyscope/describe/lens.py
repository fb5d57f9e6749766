"""The tokens that directions write most for and most against, at vocabularies of any size.

On a CPU products are taken in the number format that is faster there and only screen the tokens: the few that may be among the
strongest are scored again in float64, so the answer does not depend on the format. No [latents, vocabulary] matrix is held.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from everyscope.describe.lens_kernels import ENDS, Factors, ScreenedChunk, rescore, screen_tile
from everyscope.sae.kernels.cpu import round_rows
from everyscope.sae.threads import Threads

CHUNK_LATENTS = 256
"""Directions that one thread screens together: as many as amortise reading a tile of the unembedding [latents]."""
TILE_TOKENS = 2048
"""Tokens screened at a time; their products with a chunk of directions, 1 MiB, stay in the cache [tokens]."""
ROOM_SHARE = 64
"""Candidates kept for each token wanted; more of them than that tie."""
TRIAL_ROWS, TRIALS = 128, 3
"""Directions, and products with a tile in each number format, by which the faster format is found."""


@dataclass(frozen=True)
class Ends:
    """Tokens and products of some directions: the largest first, then the smallest, each from its end inwards."""

    tokens: Int32[np.ndarray, "latents 2 count"]
    values: Float32[np.ndarray, "latents 2 count"]


class Lens:
    """An unembedding, prepared once for all directions that are to be looked at through it."""

    def __init__(self, unembedding: Float[Tensor, "vocab d_model"], num_known: int) -> None:
        """Only tokens below `num_known` count: models pad their vocabulary, and what is behind the last token is no token."""
        self._rows = unembedding[:num_known].detach().float().contiguous()
        if self._rows.device.type == "cpu":
            self._threads = Threads(torch.get_num_threads())
            self._dtype = faster_format(self._rows[:TILE_TOKENS])
            self._screen, self._factors = _factors(self._rows, self._dtype)

    def ends(self, directions: Float[Tensor, "latents d_model"], count: int) -> Ends:
        """The `count` tokens of largest and of smallest product with each direction; of equals the smaller token comes first."""
        directions, count = directions.to(self._rows).contiguous(), min(count, len(self._rows))
        if directions.device.type != "cpu":
            return _ends_by_tiles(directions, self._rows, count)
        screen, factors = _factors(directions, self._dtype)
        ends = Ends(*(np.empty((len(directions), ENDS, count), kind) for kind in (np.int32, np.float32)))
        chunk = max(1, min(CHUNK_LATENTS, -(-len(directions) // self._threads.count)))
        overflow = self._threads.map(
            lambda start: self._chunk(screen, factors, start, chunk, ends), range(0, len(directions), chunk)
        )
        for latent in np.concatenate(overflow).tolist() if overflow else []:
            whole = _ends_by_tiles(directions[latent : latent + 1], self._rows, count)
            ends.tokens[latent], ends.values[latent] = whole.tokens[0], whole.values[0]
        return ends

    def _chunk(self, screen: Tensor, factors: Factors, start: int, chunk: int, ends: Ends) -> np.ndarray:
        """Fill in the ends of the directions from `start` on; gives those for which almost all tokens tie."""
        rounded = screen[start : start + chunk]
        shape = (len(rounded), ENDS, ends.tokens.shape[2])
        hits = np.zeros(-(-TILE_TOKENS // 8) * 8, np.int8)
        found = ScreenedChunk(
            bounds=np.full(shape, -np.inf, np.float32),
            tokens=np.empty((*shape[:2], shape[2] * ROOM_SHARE), np.int32),
            reach=np.empty((*shape[:2], shape[2] * ROOM_SHARE), np.float32),
            sizes=np.zeros(shape[:2], np.int64),
            hits=hits,
            eight_hits=hits.view(np.int64),
        )
        rows = self._factors
        products = torch.empty(len(rounded), TILE_TOKENS, dtype=self._dtype)
        for first in range(0, len(rows.norms), TILE_TOKENS):
            tile = self._screen[first : first + TILE_TOKENS]
            if len(tile) < TILE_TOKENS:
                products = torch.empty(len(rounded), len(tile), dtype=self._dtype)
                hits[len(tile) :] = 0
            torch.mm(rounded, tile.T, out=products)
            norm, residual = (part[first : first + TILE_TOKENS].max() for part in (rows.norms, rows.residuals))
            bits = products.bfloat16().view(torch.int16).numpy()
            screen_tile(bits, first, factors, start, rows, norm, residual, found)
        rescore(factors, start, rows, found, ends.tokens, ends.values)
        return start + np.flatnonzero((found.sizes < 0).any(1))


def _factors(rows: Float[Tensor, "n d_model"], dtype: torch.dtype) -> tuple[Tensor, Factors]:
    """Rows in the format of the product, and exact with their bounds."""
    exact = rows.numpy()
    bits = np.empty(exact.shape, np.uint16)
    norms, residuals = np.empty(len(exact), np.float32), np.empty(len(exact), np.float32)
    round_rows(exact, 0, len(exact), bits, norms, residuals)
    if dtype == torch.bfloat16:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), Factors(exact, norms, residuals)
    return rows, Factors(exact, norms, np.zeros_like(residuals))


def faster_format(rows: Float[Tensor, "n d_model"]) -> torch.dtype:
    """bfloat16 or float32, in whichever this CPU multiplies directions by such rows sooner, by trial. No result depends on it."""
    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        factor, directions = rows.to(dtype), torch.ones(TRIAL_ROWS, rows.shape[1], dtype=dtype)
        seconds = []
        for _ in range(TRIALS):
            begin = time.perf_counter()
            torch.mm(directions, factor.T)
            seconds.append(time.perf_counter() - begin)
        taken[dtype] = min(seconds)
    return min(taken, key=lambda dtype: taken[dtype])


def _ends_by_tiles(directions: Float[Tensor, "latents d_model"], rows: Float[Tensor, "vocab d_model"], count: int) -> Ends:
    """The same by whole float32 products of a tile of tokens and torch's own top-k; on any device."""
    best: list[tuple[Tensor, Tensor]] = []
    for sign in (1, -1):
        tokens = torch.empty(len(directions), 0, dtype=torch.int64, device=rows.device)
        values = directions.new_empty(len(directions), 0)
        for first in range(0, len(rows), TILE_TOKENS):
            products = sign * (directions @ rows[first : first + TILE_TOKENS].T)
            numbers = torch.arange(first, first + products.shape[1], device=rows.device).expand(len(products), -1)
            tokens, values = torch.cat([tokens, numbers], 1), torch.cat([values, products], 1)
            order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
            tokens, values = tokens.gather(1, order), values.gather(1, order)
        best.append((tokens, sign * values))
    tokens, values = (torch.stack([end[number] for end in best], 1).cpu().numpy() for number in (0, 1))
    return Ends(tokens.astype(np.int32), values)
