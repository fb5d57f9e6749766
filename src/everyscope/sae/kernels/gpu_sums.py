"""The pair path's backward half on a GPU, up to the gradients: what each latent's pairs sum to.

A latent with more pairs than SEGMENT would keep one program busy long after all others: its further segments are summed by
programs of their own, and added, in order, by the one that updates the latent.
"""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from everyscope.sae.gpu_limits import SEGMENT
from everyscope.sae.kernels.gpu_triton import blocks, columns_of, constexpr, jit, tl


@dataclass(frozen=True)
class PairLists:
    """The pairs of one batch by latent, rows ascending: those of latent i lie at [start[i], start[i + 1])."""

    start: Int64[Tensor, " d_sae_1"]
    row: Int32[Tensor, " room"]
    latent: Int32[Tensor, " room"]
    pre: Float32[Tensor, " room"]
    """Pre-activations."""
    d_f: Float32[Tensor, " room"]
    """The loss's derivative by the latent's activation."""


class LatentSums(NamedTuple):
    """What a latent's pairs sum to, each [d_sae]."""

    pairs: Int32[Tensor, " d_sae"]
    """Active or near; what the screen let through without need does not count."""
    active: Int32[Tensor, " d_sae"]
    near: Int32[Tensor, " d_sae"]
    d_b_enc: Float32[Tensor, " d_sae"]
    """d_f where active."""
    parallel: Float32[Tensor, " d_sae"]
    """f d_f where active: the inner product of W_dec and its gradient, for d_f is one of W_dec and the error."""
    near_d_f: Float32[Tensor, " d_sae"]
    """d_f where near."""


@jit
def _sum_latents(
    start, pre_of, d_f_of, threshold, pairs_out, active_out, near_out, d_b_enc_out, parallel_out, near_d_f_out, half, width,
    latents: constexpr, pairs: constexpr,
):  # fmt: skip
    latent = tl.program_id(0) * latents + tl.arange(0, latents)
    known = latent < width
    first = tl.load(start + latent, known, other=0)
    number = tl.load(start + latent + 1, known, other=0) - first
    level = tl.load(threshold + latent, known, other=0.0)[:, None]
    num_pairs = tl.zeros([latents], tl.int32)
    num_active = tl.zeros([latents], tl.int32)
    num_near = tl.zeros([latents], tl.int32)
    d_b_enc = tl.zeros([latents], tl.float32)
    parallel = tl.zeros([latents], tl.float32)
    near_d_f = tl.zeros([latents], tl.float32)
    for begin in range(0, tl.max(number, 0), pairs):
        at = begin + tl.arange(0, pairs)[None, :]
        on = at < number[:, None]
        pre = tl.load(pre_of + first[:, None] + at, on, other=0.0)
        d_f = tl.load(d_f_of + first[:, None] + at, on, other=0.0)
        active = on & ~(pre <= level)
        near = on & (tl.abs(pre - level) < half)
        num_pairs += tl.sum((active | near).to(tl.int32), 1)
        num_active += tl.sum(active.to(tl.int32), 1)
        num_near += tl.sum(near.to(tl.int32), 1)
        d_b_enc += tl.sum(tl.where(active, d_f, 0.0), 1)
        parallel += tl.sum(tl.where(active, d_f * pre, 0.0), 1)
        near_d_f += tl.sum(tl.where(near, d_f, 0.0), 1)
    tl.store(pairs_out + latent, num_pairs, known)
    tl.store(active_out + latent, num_active, known)
    tl.store(near_out + latent, num_near, known)
    tl.store(d_b_enc_out + latent, d_b_enc, known)
    tl.store(parallel_out + latent, parallel, known)
    tl.store(near_d_f_out + latent, near_d_f, known)


def sum_latents(lists: PairLists, threshold: Float32[Tensor, " d_sae"], bandwidth: float) -> LatentSums:
    """Counts and sums over each latent's pairs."""
    width = threshold.shape[0]
    counts = torch.empty(3, width, dtype=torch.int32, device=threshold.device)
    sums = LatentSums(*counts, *torch.empty(3, width, device=threshold.device))
    _sum_latents[(blocks(width, 32),)](lists.start, lists.pre, lists.d_f, threshold, *sums, bandwidth / 2, width, 32, 16)
    return sums


@jit
def _add_pairs(d_W_enc, d_W_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, inside, level, d, pairs: constexpr):
    """Add to both gradients, on some columns, what the pairs [begin, end) of one latent give."""
    for first in range(begin, end, pairs):
        pair = first + tl.arange(0, pairs)
        pre = tl.load(pre_of + pair, pair < end, other=0.0)
        active = (pair < end) & ~(pre <= level)
        line = tl.load(row_of + pair, active, other=0).to(tl.int64)[:, None] * d + column[None, :]
        taken = active[:, None] & inside[None, :]
        d_f = tl.load(d_f_of + pair, active, other=0.0)
        d_W_enc += tl.sum(d_f[:, None] * tl.load(x + line, taken, other=0.0), 0)
        d_W_dec += tl.sum(tl.where(active, pre, 0.0)[:, None] * tl.load(error + line, taken, other=0.0), 0)
    return d_W_enc, d_W_dec


@jit
def errors_of(latent, errors, prefixes, rows, d, groups: constexpr):
    """The error that the latent's gradients come from: its group's."""
    for group in tl.static_range(groups - 1):
        errors += tl.where(latent >= tl.load(prefixes + group), rows, 0).to(tl.int64) * d
    return errors


@jit
def gradients_of(
    latent, column, start, row_of, pre_of, d_f_of, x, error, level, segment_start, segment_sums, d, segment: constexpr,
    pairs: constexpr, tile: constexpr,
):  # fmt: skip
    """A latent's gradients by W_enc and W_dec on some columns: its first segment's pairs, and the sums of the others."""
    inside = column < d
    begin = tl.load(start + latent)
    end = tl.minimum(begin + segment, tl.load(start + latent + 1))
    g_enc = tl.zeros([tile], tl.float32)
    g_dec = tl.zeros([tile], tl.float32)
    g_enc, g_dec = _add_pairs(g_enc, g_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, inside, level, d, pairs)
    for number in range(tl.load(segment_start + latent), tl.load(segment_start + latent + 1)):  # int64, as its ends are
        g_enc += tl.load(segment_sums + number * 2 * d + column, inside, other=0.0)
        g_dec += tl.load(segment_sums + number * 2 * d + d + column, inside, other=0.0)
    return g_enc, g_dec


@jit
def _sum_segments(
    sums, segment_start, start, row_of, pre_of, d_f_of, x, errors, threshold, prefixes, rows, width, d, steps, segment: constexpr,
    groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if number < tl.load(segment_start + width):
        low = 0
        high = width
        for _ in range(steps):  # the last latent whose segments begin at or before this one
            middle = (low + high) // 2
            before = tl.load(segment_start + middle) <= number
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        begin = tl.load(start + low) + (number - tl.load(segment_start + low) + 1).to(tl.int64) * segment
        end = tl.minimum(begin + segment, tl.load(start + low + 1))
        column = tl.program_id(1) * tile + tl.arange(0, tile)
        error = errors_of(low, errors, prefixes, rows, d, groups)
        d_W_enc = tl.zeros([tile], tl.float32)
        d_W_dec = tl.zeros([tile], tl.float32)
        d_W_enc, d_W_dec = _add_pairs(
            d_W_enc, d_W_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, column < d, tl.load(threshold + low), d, pairs
        )
        at = sums + number.to(tl.int64) * 2 * d + column
        tl.store(at, d_W_enc, column < d)
        tl.store(at + d, d_W_dec, column < d)


@jit
def _sum_wholly(
    gradients, segment_start, segment_sums, start, row_of, pre_of, d_f_of, x, errors, threshold, prefixes, rows, d,
    segment: constexpr, groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < d
    error = errors_of(latent, errors, prefixes, rows, d, groups)
    level = tl.load(threshold + latent)
    g_enc, g_dec = gradients_of(
        latent, column, start, row_of, pre_of, d_f_of, x, error, level, segment_start, segment_sums, d, segment, pairs, tile
    )
    tl.store(gradients + latent * 2 * d + column, g_enc, inside)
    tl.store(gradients + latent * 2 * d + d + column, g_dec, inside)


def sum_gradients(
    gradients: Float32[Tensor, "d_sae 2 d_in"],
    lists: PairLists,
    threshold: Float32[Tensor, " d_sae"],
    centred: Float32[Tensor, "batch d_in"],
    errors: Float32[Tensor, "groups batch d_in"],
    prefixes: Int64[Tensor, " groups"],
    segment_sums: Float32[Tensor, "segments 2 d_in"],
) -> None:
    """Fill in each latent's gradients by W_enc and by W_dec (whose part along the latent's direction is still in it)."""
    segments = sum_segments(lists, threshold, centred, errors, prefixes, segment_sums)
    groups, rows, d_in = errors.shape
    tile, warps = columns_of(d_in, 4)
    _sum_wholly[(len(threshold), blocks(d_in, tile))](
        gradients, segments, segment_sums, lists.start, lists.row, lists.pre, lists.d_f, centred, errors, threshold, prefixes,
        rows, d_in, SEGMENT, groups, 8, tile, num_warps=warps,
    )  # fmt: skip


def sum_segments(
    lists: PairLists,
    threshold: Float32[Tensor, " d_sae"],
    centred: Float32[Tensor, "batch d_in"],
    errors: Float32[Tensor, "groups batch d_in"],
    prefixes: Int64[Tensor, " groups"],
    segment_sums: Float32[Tensor, "segments 2 d_in"],
) -> Int64[Tensor, " d_sae_1"]:
    """Fill in the sums of all segments but each latent's first; where each latent's begin among them."""
    groups, rows, d_in = errors.shape
    width, (tile, warps) = threshold.shape[0], columns_of(d_in, 4)
    segments = torch.zeros_like(lists.start)
    torch.cumsum((lists.start.diff() - 1).clamp_(min=0) // SEGMENT, 0, out=segments[1:])
    _sum_segments[(segment_sums.shape[0], blocks(d_in, tile))](
        segment_sums, segments, lists.start, lists.row, lists.pre, lists.d_f, centred, errors, threshold, prefixes, rows, width,
        d_in, width.bit_length(), SEGMENT, groups, 8, tile, num_warps=warps,
    )  # fmt: skip
    return segments
