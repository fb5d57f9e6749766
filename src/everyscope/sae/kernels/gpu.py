"""The pair path's forward half on a GPU: screen, lists of pairs, float32 products at pairs, reconstruction.

The screen leaves one bit for every (row, latent), by row and by latent. Lists are read off the bits in either order, so nothing
is sorted, and one bit in 16 of what a bfloat16 product takes is all that lasts of it. What the screen lets through without
need stays in the lists: where a pre-activation is neither active nor near, it takes part in nothing.

Each number is summed by one program, in an order that sizes alone decide: no atomics, the same bits on every run.
"""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

import torch
from jaxtyping import BFloat16, Float32, Int32, Int64
from torch import Tensor

from everyscope.sae.kernels.gpu_triton import blocks, columns_of, constexpr, dots_tile, jit, tl, to_bfloat16

ROOM = 1.001
"""Norms in the screen's margin are taken this much too large: they are rounded sums themselves."""
CHUNK_ELEMENTS = 1 << 24
"""Products screened at once: 32 MiB in bfloat16, which the second-level cache still holds when they are tested."""
PROGRAMS = 2048
"""Programs that share a list whose length only the device knows."""


@jit
def _round_rows(source, bias, centred, rounded, norms, residuals, d, room, has_bias: constexpr, tile: constexpr):
    row = tl.program_id(0).to(tl.int64)
    norm = tl.zeros([tile], tl.float32)
    lost = tl.zeros([tile], tl.float32)
    for first in range(0, d, tile):
        column = first + tl.arange(0, tile)
        inside = column < d
        value = tl.load(source + row * d + column, inside, other=0.0)
        if has_bias:
            value = value - tl.load(bias + column, inside, other=0.0)
            tl.store(centred + row * d + column, value, inside)
        half = value.to(tl.bfloat16)
        tl.store(rounded + row * d + column, half, inside)
        rest = value - half.to(tl.float32)
        norm += value * value
        lost += rest * rest
    tl.store(norms + row, tl.sqrt(tl.sum(norm, 0)) * room)
    tl.store(residuals + row, tl.sqrt(tl.sum(lost, 0)) * room)


def round_rows(
    source: Float32[Tensor, "rows d_in"],
    rounded: BFloat16[Tensor, "rows d_in"],
    norms: Float32[Tensor, " rows"],
    residuals: Float32[Tensor, " rows"],
    bias: Float32[Tensor, " d_in"] | None = None,
    centred: Float32[Tensor, "rows d_in"] | None = None,
) -> None:
    """Write `source` less `bias`, if one is given, into `centred` and in bfloat16 into `rounded`.

    Upper bounds of each row's norm, and of the norm of what rounding took from it, go into `norms` and `residuals`.
    """
    rows, d_in = source.shape
    has_bias = bias is not None
    tile, warps = columns_of(d_in, 4)
    _round_rows[(rows,)](
        source, bias if has_bias else source, centred if has_bias else source, rounded, norms, residuals, d_in, ROOM, has_bias,
        tile, num_warps=warps,
    )  # fmt: skip


@jit
def _mark(
    product, stride, first, count, b_enc, threshold, w_norm, w_residual, x_norm, x_residual, by_row, by_latent, rows, row_words,
    latent_words, bandwidth, epsilon, tile_rows: constexpr, tile_latents: constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    place = tl.program_id(1) * tile_latents + tl.arange(0, tile_latents)
    latent = first + place
    in_rows = row < rows
    in_latents = place < count
    inside = in_rows[:, None] & in_latents[None, :]
    screened = tl.load(product + row[:, None].to(tl.int64) * stride + place[None, :], inside, other=0.0).to(tl.float32)
    wn = tl.load(w_norm + latent, in_latents, other=0.0)[None, :]
    wr = tl.load(w_residual + latent, in_latents, other=0.0)[None, :]
    xn = tl.load(x_norm + row, in_rows, other=0.0)[:, None]
    xr = tl.load(x_residual + row, in_rows, other=0.0)[:, None]
    level = tl.load(threshold + latent, in_latents, other=0.0)
    offset = tl.load(b_enc + latent, in_latents, other=0.0)
    margin = xr * wn + (xn + xr) * wr + epsilon * (xn + xr) * (wn + wr)
    slack = (level + bandwidth + tl.abs(offset)) * 4.76837158203125e-07  # 2^-21: roundings of threshold, bandwidth and bias
    least = (level - bandwidth / 2 - offset - slack)[None, :] - margin
    least = least - tl.abs(least) * 0.00390625  # 2^-8: rounding the product to bfloat16 is monotone, and off by half of this
    bits = (inside & ~(screened < least)).to(tl.int32)
    lanes = tl.arange(0, 32)
    words = tl.sum(tl.reshape(bits, [tile_rows, tile_latents // 32, 32]) << lanes[None, None, :], 2)
    word = (first + tl.program_id(1) * tile_latents) // 32 + tl.arange(0, tile_latents // 32)
    tl.store(
        by_row + row[:, None].to(tl.int64) * row_words + word[None, :], words, in_rows[:, None] & (word < row_words)[None, :]
    )
    words = tl.sum(tl.reshape(bits, [tile_rows // 32, 32, tile_latents]) << lanes[None, :, None], 1)
    word = tl.program_id(0) * (tile_rows // 32) + tl.arange(0, tile_rows // 32)
    at = by_latent + latent[None, :].to(tl.int64) * latent_words + word[:, None]
    tl.store(at, words, in_latents[None, :] & (word < latent_words)[:, None])


def screen(
    x: tuple[BFloat16[Tensor, "batch d_in"], Float32[Tensor, " batch"], Float32[Tensor, " batch"]],
    W_enc: tuple[BFloat16[Tensor, "d_sae d_in"], Float32[Tensor, " d_sae"], Float32[Tensor, " d_sae"]],
    b_enc: Float32[Tensor, " d_sae"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    by_row: Int32[Tensor, "batch row_words"],
    by_latent: Int32[Tensor, "d_sae latent_words"],
) -> None:
    """Mark, one bit each, every (row, latent) that may be a pair; x and W_enc come as `round_rows` leaves them.

    None is missed. A pair has x.w > threshold - bandwidth / 2 - b_enc, in float32 as `pre_activations_at` sums it. With the
    rounded factors x^ and w^, |x.w - x^.w^| <= |x - x^| |w| + |x^| |w - w^|. Both products are sums of d_in float32 terms: off
    by at most d_in 2^-24 |x| |w| where each addition rounds, and by twice that, with an eighth for aligned blocks, where tensor
    cores cut off: together less than d_in 2^-22 |x| |w|. What is not a number passes.
    """
    rounded, x_norm, x_residual = x
    w_rounded, w_norm, w_residual = W_enc
    rows, d_in = rounded.shape
    width = w_rounded.shape[0]
    chunk = max(1024, CHUNK_ELEMENTS // rows // 1024 * 1024)
    allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    # Else a product may be split along d_in and its parts summed in bfloat16, which the margin does not cover.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        for first in range(0, width, chunk):
            product = rounded @ w_rounded[first : first + chunk].T
            count = product.shape[1]
            _mark[(blocks(rows, 32), blocks(count, 128))](
                product, product.stride(0), first, count, b_enc, threshold, w_norm, w_residual, x_norm, x_residual, by_row,
                by_latent, rows, by_row.shape[1], by_latent.shape[1], bandwidth, d_in * 2.0**-22, 32, 128,
            )  # fmt: skip
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


@jit
def popcount(word):
    """How many bits of each word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@jit
def lowest_bits(word):
    """The place of each word's lowest set bit."""
    return popcount(~word & (word - 1))


@jit
def _count(bits, counts, lines, words, tile_lines: constexpr, tile_words: constexpr):
    line = tl.program_id(0) * tile_lines + tl.arange(0, tile_lines)
    total = tl.zeros([tile_lines], tl.int32)
    for first in range(0, words, tile_words):
        word = first + tl.arange(0, tile_words)
        inside = (line < lines)[:, None] & (word < words)[None, :]
        found = tl.load(bits + line[:, None].to(tl.int64) * words + word[None, :], inside, other=0)
        total += tl.sum(popcount(found), 1)
    tl.store(counts + line, total.to(tl.int64), line < lines)


@jit
def _list(bits, start, index_of, line_of, num_lines, words, lines: constexpr, tile: constexpr):
    line = tl.program_id(0) * lines + tl.arange(0, lines)
    known = line < num_lines
    at = tl.load(start + line, known, other=0)
    listed = known & (at < tl.load(start + line + 1, known, other=0))
    if tl.max(listed.to(tl.int32), 0) > 0:
        for first in range(0, words, tile):
            word = first + tl.arange(0, tile)
            taken = listed[:, None] & (word < words)[None, :]
            left = tl.load(bits + line[:, None].to(tl.int64) * words + word[None, :], taken, other=0)
            count = popcount(left)
            to = at[:, None] + tl.cumsum(count, 1) - count
            at += tl.sum(count, 1)
            while tl.max(tl.max((left != 0).to(tl.int32), 1), 0) > 0:  # the lowest bit of every word: sparse words have few
                tl.store(index_of + to, word[None, :] * 32 + lowest_bits(left), left != 0)
                tl.store(line_of + to, tl.broadcast_to(line[:, None], [lines, tile]), left != 0)
                to += (left != 0).to(tl.int64)
                left = left & (left - 1)


def count_marks(bits: Int32[Tensor, "lines words"], start: Int64[Tensor, " lines_1"]) -> None:
    """Where each line's marks begin in a list of all, and behind the last one their number."""
    lines, words = bits.shape
    _count[(blocks(lines, 16),)](bits, start[1:], lines, words, 16, 128)
    torch.cumsum(start[1:], 0, out=start[1:])


def list_marks(
    bits: Int32[Tensor, "lines words"],
    start: Int64[Tensor, " lines_1"],
    index_of: Int32[Tensor, " room"],
    line_of: Int32[Tensor, " room"],
) -> None:
    """Write each mark's place in its line and its line, line after line, ascending; nothing where `start` is all zero."""
    lines, words = bits.shape
    at_once, tile = (8, 128) if words <= 128 else (2, 512)
    _list[(blocks(lines, at_once),)](bits, start, index_of, line_of, lines, words, at_once, tile)


@jit
def _dots(
    out, left, row_of, right, latent_of, bias, pre_of, threshold, half, prefixes, num_pairs, rows, d, groups: constexpr,
    has_bias: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    count = tl.load(num_pairs)
    for first in range(tl.program_id(0) * pairs, count, tl.num_programs(0) * pairs):
        pair = first + tl.arange(0, pairs)
        on = pair < count
        latent = tl.load(latent_of + pair, on, other=0).to(tl.int64)
        line = tl.load(row_of + pair, on, other=0).to(tl.int64)
        wanted = on
        if not has_bias:
            pre = tl.load(pre_of + pair, on, other=0.0)
            level = tl.load(threshold + latent)
            wanted = on & (~(pre <= level) | (tl.abs(pre - level) < half))
        for group in tl.static_range(groups - 1):
            line += tl.where(latent >= tl.load(prefixes + group), rows, 0)
        total = tl.zeros([pairs, tile], tl.float32)
        for begin in range(0, d, tile):
            column = begin + tl.arange(0, tile)
            inside = wanted[:, None] & (column < d)[None, :]
            a = tl.load(left + line[:, None] * d + column[None, :], inside, other=0.0)
            total += a * tl.load(right + latent[:, None] * d + column[None, :], inside, other=0.0)
        result = tl.sum(total, 1)
        if has_bias:
            result += tl.load(bias + latent, on, other=0.0)
        tl.store(out + pair, result, on)


def pre_activations_at(
    out: Float32[Tensor, " room"],
    centred: Float32[Tensor, "batch d_in"],
    row_of: Int32[Tensor, " room"],
    W_enc: Float32[Tensor, "d_sae d_in"],
    latent_of: Int32[Tensor, " room"],
    b_enc: Float32[Tensor, " d_sae"],
    num_pairs: Int64[Tensor, ""],
) -> None:
    """At each listed (b, i): centred[b] . W_enc[i] + b_enc[i]. By latent, so that each row of W_enc is read about once."""
    rows, d_in = centred.shape
    _dots[(min(PROGRAMS, blocks(out.shape[0], 16)),)](
        out, centred, row_of, W_enc, latent_of, b_enc, out, out, 0.0, num_pairs, num_pairs, rows, d_in, 1, True, 16,
        dots_tile(d_in),
    )  # fmt: skip


def gradients_at(
    out: Float32[Tensor, " room"],
    errors: Float32[Tensor, "groups batch d_in"],
    row_of: Int32[Tensor, " room"],
    W_dec: Float32[Tensor, "d_sae d_in"],
    latent_of: Int32[Tensor, " room"],
    pre: Float32[Tensor, " room"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    prefixes: Int64[Tensor, " groups"],
    num_pairs: Int64[Tensor, ""],
) -> None:
    """At each pair (b, i), the loss's derivative by its activation, errors[g(i), b] . W_dec[i]; 0 where listed without need."""
    groups, rows, d_in = errors.shape
    _dots[(min(PROGRAMS, blocks(out.shape[0], 16)),)](
        out, errors, row_of, W_dec, latent_of, out, pre, threshold, bandwidth / 2, prefixes, num_pairs, rows, d_in, groups, False,
        16, dots_tile(d_in),
    )  # fmt: skip


@jit
def _to_rows(pre, row_of, latent_of, row_start, latent, pre_by_row, num_pairs, steps, pairs: constexpr):
    count = tl.load(num_pairs)
    for first in range(tl.program_id(0) * pairs, count, tl.num_programs(0) * pairs):
        pair = first + tl.arange(0, pairs)
        on = pair < count
        wanted = tl.load(latent_of + pair, on, other=0)
        row = tl.load(row_of + pair, on, other=0)
        low = tl.load(row_start + row, on, other=0)
        high = tl.load(row_start + row + 1, on, other=0)
        for _ in range(steps):  # halves the part of the row's list that the latent may be in
            middle = (low + high) // 2
            below = tl.load(latent + middle, on & (low < high), other=0) < wanted
            high = tl.where((low < high) & ~below, middle, high)
            low = tl.where((low < high) & below, middle + 1, low)
        tl.store(pre_by_row + low, tl.load(pre + pair, on, other=0.0), on)


def to_rows(
    pre: Float32[Tensor, " room"],
    row_of: Int32[Tensor, " room"],
    latent_of: Int32[Tensor, " room"],
    row_start: Int64[Tensor, " batch_1"],
    latent: Int32[Tensor, " room"],
    pre_by_row: Float32[Tensor, " room"],
    num_pairs: Int64[Tensor, ""],
    width: int,
) -> None:
    """Pre-activations of pairs by latent, brought into the order by row. Each finds its place by halving its row's list."""
    programs = min(PROGRAMS, blocks(pre.shape[0], 128))
    _to_rows[(programs,)](pre, row_of, latent_of, row_start, latent, pre_by_row, num_pairs, width.bit_length(), 128)


@jit
def _decode(
    errors, rounded, squares, x, b_dec, W_dec, row_start, latent_of, pre_of, threshold, prefixes, rows, d, share,
    is_first: constexpr, is_rounded: constexpr, groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < d
    error = tl.zeros([tile], tl.float32)
    if is_first:
        error = tl.load(b_dec + column, inside, other=0.0) - tl.load(x + row * d + column, inside, other=0.0)
    stop = tl.load(row_start + row + 1)
    for group in tl.static_range(groups):
        before = tl.load(prefixes + group)
        for first in range(tl.load(row_start + row), stop, pairs):
            pair = first + tl.arange(0, pairs)
            latent = tl.load(latent_of + pair, pair < stop, other=0).to(tl.int64)
            pre = tl.load(pre_of + pair, pair < stop, other=0.0)
            active = (pair < stop) & ~(pre <= tl.load(threshold + latent)) & (latent < before)
            if group > 0:
                active = active & (latent >= tl.load(prefixes + group - 1))
            f = tl.where(active, pre, 0.0)
            w = tl.load(W_dec + latent[:, None] * d + column[None, :], active[:, None] & inside[None, :], other=0.0)
            error += tl.sum(f[:, None] * w.to(tl.float32), 0)
        at = (group * rows + row) * d + column
        tl.store(errors + at, error * share, inside)
        if is_rounded:
            tl.store(rounded + at, to_bfloat16(error * share), inside)
    tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error, 0))


def decode_errors(
    errors: Float32[Tensor, "groups batch d_in"],
    x: Float32[Tensor, "batch d_in"],
    b_dec: Float32[Tensor, " d_in"],
    W_dec: Float32[Tensor, "d_sae d_in"] | BFloat16[Tensor, "d_sae d_in"],
    row_start: Int64[Tensor, " batch_1"],
    latent: Int32[Tensor, " room"],
    pre: Float32[Tensor, " room"],
    threshold: Float32[Tensor, " d_sae"],
    prefixes: Int64[Tensor, " groups"],
    batch: int,
    is_first: bool = True,
    rounded: BFloat16[Tensor, "groups batch d_in"] | None = None,
) -> Float32[Tensor, ""]:
    """Fill in errors[g] = sum over prefixes k >= g of 2 / (batch groups) (x_hat^k - x); sum of ||x - x_hat||^2 / batch.

    `rounded` gets the same in bfloat16, if it is given. `batch` counts the rows of all replicas. Where the latents are a shard,
    errors become its part of that sum, and what is returned means nothing; b_dec - x is in the part of the shard that `is_first`.
    """
    groups, rows, d_in = errors.shape
    tile, warps = columns_of(d_in, W_dec.element_size())
    squares = x.new_empty(rows, blocks(d_in, tile))
    rounds_at_once = rounded is not None and groups == 1  # of several groups, sums are rounded
    _decode[(rows, squares.shape[1])](
        errors, rounded if rounds_at_once else errors, squares, x, b_dec, W_dec, row_start, latent, pre, threshold, prefixes,
        rows, d_in, 2 / (batch * groups), is_first, rounds_at_once, groups, 8, tile, num_warps=warps,
    )  # fmt: skip
    for group in reversed(range(groups - 1)):
        errors[group] += errors[group + 1]
    if rounded is not None and not rounds_at_once:
        rounded.copy_(errors)
    return squares.sum() / batch
