"""Which tokens a direction may write most for or against, from products rounded to bfloat16, compiled by numba.

The product of a direction h and a token's row w is screened: it was taken of rounded factors, perhaps, and is rounded itself.
Bounds of its error decide which tokens may be among the `count` largest or smallest, and these are scored again from the exact
factors. So what comes out does not depend on how the product was taken.

By end (0 the largest, 1 the smallest, whose products change sign): bounds [latents, 2, count], candidates [latents, 2, room].
"""

from typing import NamedTuple

import numpy as np

from everyscope.sae.kernels.cpu import EPSILON, ROOM, compiled, inlined, reaches

LARGEST, SMALLEST = 0, 1
ENDS = 2
SIGN = np.int16(-32768)
OUTPUT_ERROR = np.float32(2.0**-8)
"""Bound of the relative error of a product that was rounded to bfloat16, taken twice for the roundings of the bound itself."""


class Factors(NamedTuple):
    """The directions of one chunk, or the unembedding's rows, with bounds of their norms and of what rounding took from them."""

    exact: np.ndarray
    """float32 [rows, d_model]"""
    norms: np.ndarray
    """float32 [rows]"""
    residuals: np.ndarray
    """float32 [rows]; 0 where the product is of the exact factors"""


class ScreenedChunk(NamedTuple):
    """What the screen has let through so far of one chunk of directions."""

    bounds: np.ndarray
    """Lower bounds of the products nearest the end, best first; float32 [latents, 2, count]"""
    tokens: np.ndarray
    """Candidates; int32 [latents, 2, room]"""
    reach: np.ndarray
    """Upper bounds of their products; float32 [latents, 2, room]"""
    sizes: np.ndarray
    """Candidates of each end, -1 where there was no room for them; int64 [latents, 2]"""
    hits: np.ndarray
    """1 where a token of the tile needs a look; int8 [tile, up to a multiple of 8]"""
    eight_hits: np.ndarray
    """The same memory, eight at a time; int64"""


@inlined
def key_below(bound):
    """An int16 key that every bfloat16 at or above `bound` reaches; the least key where `bound` is not finite."""
    word = np.float32(bound).view(np.int32)
    key = word ^ ((word >> np.int32(31)) & np.int32(0x7FFFFFFF))  # ordered as the numbers are
    finite = (word & np.int32(0x7F800000)) != np.int32(0x7F800000)
    return np.int16(max((key >> np.int32(16)) - 1, -32768)) if finite else np.int16(-32768)  # -1: zero has two signs


@inlined
def note(found, latent, end, token, product, margin):
    """Take a token as a candidate of one end where it may be among the best, `product` and its error's bound given."""
    bounds, size = found.bounds[latent, end], found.sizes[latent, end]
    last = bounds.shape[0] - 1
    if size < 0 or product + margin < bounds[last]:
        return
    tokens, reach = found.tokens[latent, end], found.reach[latent, end]
    if size == tokens.shape[0]:
        kept = 0
        for place in range(size):
            if reach[place] >= bounds[last]:
                tokens[kept], reach[kept] = tokens[place], reach[place]
                kept += 1
        size = kept
        if 2 * size > tokens.shape[0]:  # almost all tie: the row is searched as a whole
            found.sizes[latent, end] = -1
            return
    tokens[size], reach[size] = token, product + margin
    found.sizes[latent, end] = size + 1
    lower = product - margin
    if lower > bounds[last]:
        at = last
        while at > 0 and bounds[at - 1] < lower:
            bounds[at] = bounds[at - 1]
            at -= 1
        bounds[at] = lower


@compiled
def screen_tile(screened, first, directions, start, rows, worst_norm, worst_residual, found):
    """Note the candidates of one tile of tokens, which begins with token `first`, for directions from `start` on.

    `screened` are products in bfloat16, as bits; int16 [latents, tile]. |h.w - h^.w^| <= |h - h^| |w| + |h^| |w - w^|; sums of
    d_model terms in float32 are off by at most d_model 2^-24 |h| |w|, taken four times; and rounding the product to bfloat16 by
    less than OUTPUT_ERROR of it. `worst_norm` and `worst_residual` bound those of the tile's tokens.
    """
    width, hits, eight_hits = screened.shape[1], found.hits, found.eight_hits
    rounding = EPSILON * np.float32(rows.exact.shape[1])
    last = found.bounds.shape[2] - 1
    for latent in range(screened.shape[0]):
        norm, residual = directions.norms[start + latent], directions.residuals[start + latent]
        by_norm, by_residual = ROOM * (residual + rounding * norm), ROOM * (norm + residual)
        margin = by_norm * worst_norm + by_residual * worst_residual
        least = found.bounds[latent, LARGEST, last] - margin
        most = found.bounds[latent, SMALLEST, last] - margin
        upper = key_below(least - np.float32(2) * OUTPUT_ERROR * np.abs(least))
        lower = key_below(most - np.float32(2) * OUTPUT_ERROR * np.abs(most))
        bits = screened[latent]
        for token in range(width):  # a loop of its own, so that it runs on vectors
            hits[token] = reaches(bits[token], upper) | reaches(np.int16(bits[token] ^ SIGN), lower)
        for eight in range(eight_hits.shape[0]):
            if eight_hits[eight]:
                for token in range(8 * eight, min(8 * eight + 8, width)):
                    if hits[token]:
                        product = np.int32(np.int32(bits[token]) << np.int32(16)).view(np.float32)
                        exact = by_norm * rows.norms[first + token] + by_residual * rows.residuals[first + token]
                        exact += OUTPUT_ERROR * np.abs(product)
                        note(found, latent, LARGEST, first + token, product, exact)
                        note(found, latent, SMALLEST, first + token, -product, exact)


@compiled
def rescore(directions, start, rows, found, tokens, values):
    """From the candidates the best of each end with their products, summed in float64; of equals the smaller token comes first.

    Into `tokens` int32 and `values` float32, both [latents, 2, count], from row `start` on; rows without room are left alone.
    """
    count = tokens.shape[2]
    for latent in range(found.sizes.shape[0]):
        direction = directions.exact[start + latent]
        for end in range(ENDS):
            filled, sign = 0, 1.0 if end == LARGEST else -1.0
            best, scores = tokens[start + latent, end], np.empty(count)
            for place in range(found.sizes[latent, end]):
                if found.reach[latent, end, place] < found.bounds[latent, end, count - 1]:
                    continue
                token, product = found.tokens[latent, end, place], 0.0
                row = rows.exact[token]
                for j in range(row.shape[0]):
                    product += np.float64(direction[j]) * np.float64(row[j])
                score, at = sign * product, filled
                while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and best[at - 1] > token)):
                    at -= 1
                if at == count:
                    continue
                filled = min(filled + 1, count)
                for later in range(filled - 1, at, -1):
                    best[later], scores[later] = best[later - 1], scores[later - 1]
                best[at], scores[at] = token, score
            for place in range(filled):
                values[start + latent, end, place] = sign * scores[place]
