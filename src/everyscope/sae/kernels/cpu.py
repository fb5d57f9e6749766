"""The pair path's loops over rows and over latents, compiled for this CPU by numba.

A pair is a (row, latent) whose pre-activation is above its threshold or within half a bandwidth of it. Each kernel works
through a range of rows or of latents, alone and without the interpreter's lock, so that threads may share the work; none sums
across ranges, so results do not depend on how many threads there are. Within a sum, terms may be reassociated for vector
units, in an order fixed at compile time. NaN keeps its meaning: one that went in must come out, for so divergence is noticed.

Shapes: rows of x [batch, d_in]; W_enc [d_sae, d_in] and W_dec [d_sae, d_out] by latent; errors [batch, groups, d_out], one for
each group of latents that belongs to the same prefixes (Matryoshka; else a single group). Of an SAE d_out is d_in.
"""

from typing import NamedTuple

import numba
import numpy as np

SUM_ROWS = 64
"""Sums over rows go by so many at a time, whatever a tile is, and tiles begin at multiples: so tiling changes no bit [rows]."""
ROOM = np.float32(1.001)
"""Norms in the screen's margin are taken this much too large: they are rounded sums themselves."""
SIGN_BITS = np.int16(0x7FFF)
EPSILON = np.float32(2.0**-22)
"""Four roundings of a float32."""
HALF = np.float32(0.5)
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
compiled = numba.njit(**OPTIONS)
inlined = numba.njit(**OPTIONS, forceinline=True)
"""For what is called once a pair or a product: handing arrays to a function costs more than a short loop."""


class LatentArrays(NamedTuple):
    """The arrays of an SAE in training, by latent; float32, but for the last four."""

    W_enc: np.ndarray
    """[d_sae, d_in]"""
    W_dec: np.ndarray
    """[d_sae, d_out], rows of norm one"""
    b_enc: np.ndarray
    """[d_sae]"""
    threshold: np.ndarray
    """[d_sae]"""
    squared_W_enc: np.ndarray
    """Adam's mean of squared gradients, as of step `touched`; [d_sae, d_in]"""
    squared_W_dec: np.ndarray
    """[d_sae, d_out], or [d_sae, 1] of whole rows"""
    squared_b_enc: np.ndarray
    """[d_sae]"""
    squared_threshold: np.ndarray
    """[d_sae]"""
    coordinate_weights: np.ndarray | None
    """[d_in]; None of a transcoder, whose encoder follows nothing: it lives elsewhere than the decoder"""
    touched: np.ndarray
    """Steps that the means include; int32 [d_sae]"""
    w_rounded: np.ndarray
    """W_enc in bfloat16, as bits; uint16 [d_sae, d_in]"""
    w_norms: np.ndarray
    """Upper bounds of the norms of W_enc's rows; [d_sae]"""
    w_residuals: np.ndarray
    """Upper bounds of the norms of what rounding took from them; [d_sae]"""


class Rows(NamedTuple):
    """One batch, and what the forward pass makes of it."""

    x: np.ndarray
    """Normalised activations; float32 [batch, d_in]"""
    target: np.ndarray
    """What latents and b_dec are to give: of an SAE x itself; float32 [batch, d_out]"""
    centred: np.ndarray
    """What the encoder sees: x less an SAE's b_dec; float32 [batch, d_in]"""
    rounded: np.ndarray
    """centred in bfloat16, as bits; uint16 [batch, d_in]"""
    norms: np.ndarray
    """Upper bounds of the norms of `centred`; float32 [batch]"""
    residuals: np.ndarray
    """Upper bounds of the norms of what rounding took from it; float32 [batch]"""
    errors: np.ndarray
    """float32 [batch, groups, d_out]"""
    squares: np.ndarray
    """Squared error of each row's whole reconstruction; float32 [batch]"""
    d_b_dec: np.ndarray
    """Each SUM_ROWS rows' part of the loss's derivative by b_dec; float32 [ceil(batch / SUM_ROWS), d_out]"""


class Pairs(NamedTuple):
    """The pairs of one batch, by tile of rows, then latent, then row; `room` places for each tile."""

    start: np.ndarray
    """Where latent i's pairs of a tile begin, and end with start[tile, i + 1]; int32 [tiles, d_sae + 1]"""
    row: np.ndarray
    """int32 [tiles, room]"""
    pre: np.ndarray
    """Pre-activations; float32 [tiles, room]"""
    d_f: np.ndarray
    """The loss's derivative by the latent's activation; float32 [tiles, room]"""
    fired: np.ndarray
    """Rows of the tile on which a latent is active; int32 [tiles, d_sae]"""


class Candidates(NamedTuple):
    """What the screen lets through of one tile of rows."""

    row: np.ndarray
    """As found, by row; int32 [room]"""
    latent: np.ndarray
    """As found, ascending within a row; int32 [room]"""
    start: np.ndarray
    """Where a latent's candidates begin in `row_by_latent`; int32 [d_sae + 1]"""
    row_by_latent: np.ndarray
    """Rows by latent, ascending; int32 [room]"""
    bounds: np.ndarray
    """For each level of row norms; int16 keys [levels, d_sae]"""
    level: np.ndarray
    """Of the tile's rows; int32 [tile]"""
    hits: np.ndarray
    """1 where a latent is a candidate of the current row; int8 [d_sae, and zeros up to a multiple of 8]"""
    eight_hits: np.ndarray
    """The same memory, eight at a time; int64"""


@inlined
def dot(left, right):
    """The inner product of two vectors [d]."""
    total = np.float32(0)
    for j in range(left.shape[0]):
        total += left[j] * right[j]
    return total


@inlined
def add_scaled(total, scale, vector):
    """Add scale * vector to total, both [d], in place."""
    for j in range(total.shape[0]):
        total[j] += scale * vector[j]


@inlined
def round_row(row, rounded):
    """Write the bfloat16 bits of `row` [d], nearest even; return upper bounds of its norm and of what rounding took away."""
    norm, residual = np.float32(0), np.float32(0)
    for j in range(row.shape[0]):
        value = row[j]
        word = np.float32(value).view(np.uint32)
        half = np.uint16(np.uint32(word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        rounded[j] = half
        lost = value - np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)
        norm += value * value
        residual += lost * lost
    return np.sqrt(norm) * ROOM, np.sqrt(residual) * ROOM


@compiled
def round_rows(rows, start, stop, rounded, norms, residuals):
    """`round_row` for rows [start, stop)."""
    for row in range(start, stop):
        norms[row], residuals[row] = round_row(rows[row], rounded[row])


@compiled
def centre_rows(rows, bias, start, stop):
    """Fill in rows [start, stop): x less the pre-encoder bias [d_in], and its rounding."""
    for b in range(start, stop):
        for j in range(bias.shape[0]):
            rows.centred[b, j] = rows.x[b, j] - bias[j]
        rows.norms[b], rows.residuals[b] = round_row(rows.centred[b], rows.rounded[b])


@inlined
def max_or_nan(left, right):
    """The larger number, or NaN where one is."""
    return left if left >= right or left != left else right


@compiled
def lower_bounds(latents, bandwidth, norm, residual, bounds):
    """Per latent, a lower bound of its screened product with a row, of at most this norm, with which it makes a pair.

    A pair has x.w > threshold - bandwidth / 2 - b_enc. Of the screened product, with rounded factors x^ and w^, we know
    |x.w - x^.w^| <= |x - x^| |w| + |x^| |w - w^|; `norm` and `residual` bound |x| and |x - x^|, and so their sum |x^|; those
    of `latents` their counterparts. Each of the two products is summed in float32, in some order: off by at most
    d_in 2^-24 |x| |w|, taken four times here for second-order terms, and the few roundings in threshold - bandwidth / 2 - b_enc
    are allowed for likewise. Rounding the screened product to bfloat16 is monotone, so rounding the bound down to bfloat16
    loses nothing. Bounds are int16 keys, ordered as the numbers are; where anything is not finite, the least key, which every
    product reaches.
    """
    d_in = np.float32(latents.W_enc.shape[1])
    for i in range(bounds.shape[0]):
        least = latents.threshold[i] - HALF * bandwidth - latents.b_enc[i]
        slack = latents.threshold[i] + bandwidth + np.abs(latents.b_enc[i]) + d_in * norm * latents.w_norms[i]
        margin = residual * latents.w_norms[i] + (norm + residual) * latents.w_residuals[i] + EPSILON * slack
        bound = least - ROOM * margin
        word = np.float32(bound).view(np.int32)
        key = word ^ ((word >> np.int32(31)) & np.int32(0x7FFFFFFF))  # ordered as the numbers are
        finite = (word & np.int32(0x7F800000)) != np.int32(0x7F800000)
        bounds[i] = np.int16(key >> np.int32(16)) if finite else np.int16(-32768)


@inlined
def reaches(bits, bound):
    """True where a bfloat16, given as bits, is at least the number behind an int16 key."""
    return np.int16(bits ^ ((bits >> 15) & SIGN_BITS)) >= bound


@inlined
def screen_row(screened, bounds, row, at, found):
    """Note the candidates of one row, ascending, from place `at` on; return the place behind, or -1 where there is no room."""
    hits, eight_hits, rows, latents, start = found.hits, found.eight_hits, found.row, found.latent, found.start
    for i in range(screened.shape[0]):  # a loop of its own, so that it runs on vectors
        hits[i] = reaches(screened[i], bounds[i])
    for eight in range(eight_hits.shape[0]):
        if eight_hits[eight]:
            for i in range(8 * eight, 8 * eight + 8):
                if hits[i]:
                    if at == rows.shape[0]:
                        return -1
                    rows[at], latents[at] = row, i
                    start[i + 1] += 1
                    at += 1
    return at


@compiled
def screen_rows(first, screened, rows, latents, bandwidth, found):
    """Find the candidates of one tile, which begins with row `first`, by latent; return their number, or -1 for no room.

    `screened` are the tile's products in bfloat16, as bits; int16 [tile, d_sae]. Rows of similar norms share their bounds, so
    that a huge row widens the margin of few others.
    """
    last, levels = first + screened.shape[0], found.bounds.shape[0]
    by_norm = np.argsort(rows.norms[first:last])
    for level in range(levels):
        norm, residual = np.float32(0), np.float32(0)
        for offset in by_norm[level * len(by_norm) // levels : (level + 1) * len(by_norm) // levels]:
            found.level[offset] = level
            norm = max_or_nan(norm, rows.norms[first + offset])
            residual = max_or_nan(residual, rows.residuals[first + offset])
        lower_bounds(latents, bandwidth, norm, residual, found.bounds[level])
    found.start[:] = 0
    at = 0
    for offset in range(screened.shape[0]):
        at = screen_row(screened[offset], found.bounds[found.level[offset]], first + offset, at, found)
        if at < 0:
            return -1
    start, width = found.start, screened.shape[1]
    for i in range(width):
        start[i + 1] += start[i]
    for c in range(at):
        i = found.latent[c]
        found.row_by_latent[start[i]] = found.row[c]
        start[i] += 1
    for i in range(width, 0, -1):  # each start has moved to its stop, which is the next one's start
        start[i] = start[i - 1]
    start[0] = 0
    return at


@compiled
def reconstruct(tile, first, last, rows, latents, b_dec, bandwidth, prefixes, found, pairs, is_first):
    """Decide the candidates in float32, note the pairs, and reconstruct: errors become y_hat^k - target for every prefix k.

    By latent, so that each one's weights are read once a tile while the tile's rows stay in cache. Where the latents are a shard,
    errors become its part of that; b_dec - target is in the part of the shard that `is_first`.
    """
    group, at, place, pre_of, row_of = 0, 0, pairs.start[tile], pairs.pre[tile], pairs.row[tile]
    for row in range(first, last):
        for j in range(b_dec.shape[0]):
            rows.errors[row, 0, j] = b_dec[j] - rows.target[row, j] if is_first else np.float32(0)
    for i in range(latents.W_enc.shape[0]):
        while i >= prefixes[group]:
            rows.errors[first:last, group + 1] = rows.errors[first:last, group]
            group += 1
        fired, threshold = 0, latents.threshold[i]
        place[i] = at
        for c in range(found.start[i], found.start[i + 1]):
            row = found.row_by_latent[c]
            pre = dot(rows.centred[row], latents.W_enc[i]) + latents.b_enc[i]
            is_active = not (pre <= threshold)
            if is_active or np.abs(pre - threshold) < HALF * bandwidth:
                row_of[at], pre_of[at] = row, pre
                at += 1
            if is_active:
                fired += 1
                add_scaled(rows.errors[row, group], pre, latents.W_dec[i])
        pairs.fired[tile, i] = fired
    place[latents.W_enc.shape[0]] = at
    for later in range(group + 1, prefixes.shape[0]):
        rows.errors[first:last, later] = rows.errors[first:last, later - 1]


@compiled
def differentiate(tile, first, last, rows, latents, prefixes, pairs, batch):
    """Turn errors into the loss's derivatives by the reconstructions, and those into d_f.

    errors[g] becomes the sum over prefixes k >= g of 2 / (batch groups) (x_hat^k - x): latents of group g serve all of them.
    b_dec serves all prefixes, so it gets the sum over rows for g = 0. `first` is a multiple of SUM_ROWS; `batch` counts the rows
    of all replicas.
    """
    groups, d_out = prefixes.shape[0], rows.errors.shape[2]
    share = np.float32(2.0 / (batch * groups))
    for row in range(first, last):
        errors = rows.errors[row]
        rows.squares[row] = dot(errors[groups - 1], errors[groups - 1])
        for g in range(groups - 1, -1, -1):
            for j in range(d_out):
                errors[g, j] *= share
            if g + 1 < groups:
                add_scaled(errors[g], np.float32(1), errors[g + 1])
        if row % SUM_ROWS == 0:
            rows.d_b_dec[row // SUM_ROWS] = 0
        add_scaled(rows.d_b_dec[row // SUM_ROWS], np.float32(1), errors[0])
    group, place = 0, pairs.start[tile]
    for i in range(latents.W_dec.shape[0]):
        while i >= prefixes[group]:
            group += 1
        for p in range(place[i], place[i + 1]):
            pairs.d_f[tile, p] = dot(rows.errors[pairs.row[tile, p], group], latents.W_dec[i])
