"""The pair path's backward half on a GPU: what each latent's pairs sum to, and one fused update of all that a latent owns.

A latent with more pairs than SEGMENT would keep one program busy long after all others: its further segments are summed by
programs of their own, and added, in order, by the one that updates the latent.
"""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float32, Int32, Int64
from torch import Tensor

from everyscope.sae.gpu_limits import SEGMENT
from everyscope.sae.kernels.gpu import ROOM
from everyscope.sae.kernels.gpu_triton import blocks, constexpr, jit, tile_of, tl

LATENTS_AT_ONCE = 256
"""Latents whose shares of b_dec's gradient are summed by one program."""


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
    """f d_f where active: the inner product of w_dec and its gradient, for d_f is one of w_dec and the error."""
    near_d_f: Float32[Tensor, " d_sae"]
    """d_f where near."""


class AdamStep(NamedTuple):
    """Adam without momentum, at one step."""

    step: int
    """From 0."""
    beta2: float
    epsilon: float
    rate: float
    threshold_rate: float


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
def _add_pairs(d_w_enc, d_w_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, inside, level, d, pairs: constexpr):
    """Add to both gradients, on some columns, what the pairs [begin, end) of one latent give."""
    for first in range(begin, end, pairs):
        pair = first + tl.arange(0, pairs)
        pre = tl.load(pre_of + pair, pair < end, other=0.0)
        active = (pair < end) & ~(pre <= level)
        line = tl.load(row_of + pair, active, other=0).to(tl.int64)[:, None] * d + column[None, :]
        taken = active[:, None] & inside[None, :]
        d_f = tl.load(d_f_of + pair, active, other=0.0)
        d_w_enc += tl.sum(d_f[:, None] * tl.load(x + line, taken, other=0.0), 0)
        d_w_dec += tl.sum(tl.where(active, pre, 0.0)[:, None] * tl.load(error + line, taken, other=0.0), 0)
    return d_w_enc, d_w_dec


@jit
def _errors_of(latent, errors, prefixes, rows, d, groups: constexpr):
    """The error that the latent's gradients come from: its group's."""
    for group in tl.static_range(groups - 1):
        errors += tl.where(latent >= tl.load(prefixes + group), rows, 0).to(tl.int64) * d
    return errors


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
        error = _errors_of(low, errors, prefixes, rows, d, groups)
        d_w_enc = tl.zeros([tile], tl.float32)
        d_w_dec = tl.zeros([tile], tl.float32)
        d_w_enc, d_w_dec = _add_pairs(
            d_w_enc, d_w_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, column < d, tl.load(threshold + low), d, pairs
        )
        at = sums + number.to(tl.int64) * 2 * d + column
        tl.store(at, d_w_enc, column < d)
        tl.store(at + d, d_w_dec, column < d)


@jit
def _sum_wholly(
    gradients, segment_start, segment_sums, start, row_of, pre_of, d_f_of, x, errors, threshold, prefixes, rows, d,
    segment: constexpr, groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < d
    begin = tl.load(start + latent)
    end = tl.minimum(begin + segment, tl.load(start + latent + 1))
    error = _errors_of(latent, errors, prefixes, rows, d, groups)
    g_enc = tl.zeros([tile], tl.float32)
    g_dec = tl.zeros([tile], tl.float32)
    level = tl.load(threshold + latent)
    g_enc, g_dec = _add_pairs(g_enc, g_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, inside, level, d, pairs)
    for number in range(tl.load(segment_start + latent), tl.load(segment_start + latent + 1)):
        g_enc += tl.load(segment_sums + number * 2 * d + column, inside, other=0.0)
        g_dec += tl.load(segment_sums + number * 2 * d + d + column, inside, other=0.0)
    tl.store(gradients + latent * 2 * d + column, g_enc, inside)
    tl.store(gradients + latent * 2 * d + d + column, g_dec, inside)


@jit
def _move(parameters, means, at, inside, gradient, along, decay, fresh, correction, epsilon, rate):
    """Adam's step of the parameters at some places, in memory; less `along` times themselves is their gradient."""
    old = tl.load(parameters + at, inside, other=0.0)
    gradient -= along * old
    squared = decay * tl.load(means + at, inside, other=0.0) + fresh * gradient * gradient
    new = old - rate * gradient / (tl.sqrt(squared * correction) + epsilon)
    tl.store(parameters + at, new, inside)
    tl.store(means + at, squared, inside)
    return tl.where(inside, new, 0.0)


@jit
def _update_latents(
    w_enc, w_dec, b_enc, threshold, v_w_enc, v_w_dec, v_b_enc, v_threshold, touched, w_rounded, w_norm, w_residual, start, row_of,
    pre_of, d_f_of, num_pairs, num_near, d_b_enc, parallel, near_d_f, penalty, segment_start, segment_sums, x, errors, prefixes,
    rows, d, step, log_beta2, fresh, correction, epsilon, rate, threshold_rate, bandwidth, room, segment: constexpr,
    groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(num_pairs + latent) == 0:
        return
    decay = tl.exp2(log_beta2 * (step + 1 - tl.load(touched + latent)).to(tl.float32))
    level = tl.load(threshold + latent)
    begin = tl.load(start + latent)
    end = tl.minimum(begin + segment, tl.load(start + latent + 1))
    along = tl.load(parallel + latent)
    error = _errors_of(latent, errors, prefixes, rows, d, groups)
    squares = tl.zeros([tile], tl.float32)
    kept = tl.zeros([tile], tl.float32)
    lost = tl.zeros([tile], tl.float32)
    for first in range(0, d, tile):
        column = first + tl.arange(0, tile)
        inside = column < d
        at = latent * d + column
        g_enc = tl.zeros([tile], tl.float32)
        g_dec = tl.zeros([tile], tl.float32)
        g_enc, g_dec = _add_pairs(
            g_enc, g_dec, begin, end, row_of, pre_of, d_f_of, x, error, column, inside, level, d, pairs
        )  # fmt: skip
        for number in range(tl.load(segment_start + latent), tl.load(segment_start + latent + 1)):  # int64, as its ends are
            g_enc += tl.load(segment_sums + number * 2 * d + column, inside, other=0.0)
            g_dec += tl.load(segment_sums + number * 2 * d + d + column, inside, other=0.0)
        w = _move(w_dec, v_w_dec, at, inside, g_dec, along, decay, fresh, correction, epsilon, rate)
        squares += w * w
        w = _move(w_enc, v_w_enc, at, inside, g_enc, 0.0, decay, fresh, correction, epsilon, rate)
        half = w.to(tl.bfloat16)
        tl.store(w_rounded + at, half, inside)
        kept += w * w
        lost += (w - half.to(tl.float32)) * (w - half.to(tl.float32))
    tl.store(w_norm + latent, tl.sqrt(tl.sum(kept, 0)) * room)
    tl.store(w_residual + latent, tl.sqrt(tl.sum(lost, 0)) * room)
    tl.debug_barrier()  # the row is read again, not necessarily by the threads that wrote it
    length = tl.sqrt(tl.sum(squares, 0))
    for first in range(0, d, tile):
        column = first + tl.arange(0, tile)
        at = w_dec + latent * d + column
        tl.store(at, tl.load(at, column < d, other=0.0) / length, column < d)
    known = latent >= 0
    _move(b_enc, v_b_enc, latent, known, tl.load(d_b_enc + latent), 0.0, decay, fresh, correction, epsilon, rate)
    g = level * tl.load(near_d_f + latent) + tl.load(num_near + latent).to(tl.float32) * tl.load(penalty + latent) / rows
    w = _move(threshold, v_threshold, latent, known, -g / bandwidth, 0.0, decay, fresh, correction, epsilon, threshold_rate)
    # Below zero a threshold would let negative values pass. What is not a number stays, and is noticed.
    tl.store(threshold + latent, tl.where(w < 0, 0.0, w))
    tl.store(touched + latent, step + 1)


def update_latents(
    parameters: dict[str, Tensor],
    squared: dict[str, Tensor],
    touched: Int32[Tensor, " d_sae"],
    w_rounded: tuple[BFloat16[Tensor, "d_sae d_in"], Float32[Tensor, " d_sae"], Float32[Tensor, " d_sae"]],
    lists: PairLists,
    sums: LatentSums,
    penalty: Float32[Tensor, " d_sae"],
    centred: Float32[Tensor, "batch d_in"],
    errors: Float32[Tensor, "groups batch d_in"],
    prefixes: Int64[Tensor, " groups"],
    segment_sums: Float32[Tensor, "segments 2 d_in"],
    bandwidth: float,
    adam: AdamStep,
) -> None:
    """One step of each latent with pairs: gradients, projection, Adam, unit norm, thresholds, and the screen's copy of w_enc.

    Others are neither read nor written: their gradients are zero, and without momentum they do not move. `segment_sums` is
    scratch with room for one segment in SEGMENT pairs. `parameters` and `squared` hold w_enc [d_in, d_sae] by latent.
    """
    segments = sum_segments(lists, parameters["threshold"], centred, errors, prefixes, segment_sums)
    _update(
        parameters, squared, touched, w_rounded, lists, sums, penalty, segments, segment_sums, centred, errors, prefixes,
        errors.shape[1], bandwidth, adam,
    )  # fmt: skip


def sum_gradients(
    gradients: Float32[Tensor, "d_sae 2 d_in"],
    lists: PairLists,
    threshold: Float32[Tensor, " d_sae"],
    centred: Float32[Tensor, "batch d_in"],
    errors: Float32[Tensor, "groups batch d_in"],
    prefixes: Int64[Tensor, " groups"],
    segment_sums: Float32[Tensor, "segments 2 d_in"],
) -> None:
    """Fill in each latent's gradients by w_enc and by w_dec (whose part along the latent's direction is still in it)."""
    segments = sum_segments(lists, threshold, centred, errors, prefixes, segment_sums)
    groups, rows, d_in = errors.shape
    tile = tile_of(d_in)
    _sum_wholly[(len(threshold), blocks(d_in, tile))](
        gradients, segments, segment_sums, lists.start, lists.row, lists.pre, lists.d_f, centred, errors, threshold, prefixes,
        rows, d_in, SEGMENT, groups, 8, tile,
    )  # fmt: skip


def update_latents_by(
    gradients: Float32[Tensor, "d_sae 2 d_in"],
    parameters: dict[str, Tensor],
    squared: dict[str, Tensor],
    touched: Int32[Tensor, " d_sae"],
    w_rounded: tuple[BFloat16[Tensor, "d_sae d_in"], Float32[Tensor, " d_sae"], Float32[Tensor, " d_sae"]],
    lists: PairLists,
    sums: LatentSums,
    penalty: Float32[Tensor, " d_sae"],
    errors: Float32[Tensor, "groups batch d_in"],
    prefixes: Int64[Tensor, " groups"],
    batch: int,
    bandwidth: float,
    adam: AdamStep,
) -> None:
    """`update_latents` from gradients and `sums` that replicas have summed, over `batch` rows in all.

    To the kernel they are the further segments, one a latent, of lists that are empty.
    """
    nobody = lists.start.new_zeros(len(touched) + 1)
    segments = torch.arange(len(touched) + 1, dtype=nobody.dtype, device=nobody.device)
    empty = PairLists(nobody, lists.row, lists.latent, lists.pre, lists.d_f)
    _update(
        parameters, squared, touched, w_rounded, empty, sums, penalty, segments, gradients, errors, errors, prefixes, batch,
        bandwidth, adam,
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
    width, tile = threshold.shape[0], tile_of(d_in)
    segments = torch.zeros_like(lists.start)
    torch.cumsum((lists.start.diff() - 1).clamp_(min=0) // SEGMENT, 0, out=segments[1:])
    _sum_segments[(segment_sums.shape[0], blocks(d_in, tile))](
        segment_sums, segments, lists.start, lists.row, lists.pre, lists.d_f, centred, errors, threshold, prefixes, rows, width,
        d_in, width.bit_length(), SEGMENT, groups, 8, tile,
    )  # fmt: skip
    return segments


def _update(
    parameters: dict[str, Tensor],
    squared: dict[str, Tensor],
    touched: Tensor,
    w_rounded: tuple[Tensor, Tensor, Tensor],
    lists: PairLists,
    sums: LatentSums,
    penalty: Tensor,
    segments: Tensor,
    segment_sums: Tensor,
    centred: Tensor,
    errors: Tensor,
    prefixes: Tensor,
    rows: int,
    bandwidth: float,
    adam: AdamStep,
) -> None:
    groups, d_in = errors.shape[0], errors.shape[2]
    pairs = (lists.start, lists.row, lists.pre, lists.d_f)
    by_latent = [{**tensors, "w_enc": tensors["w_enc"].T} for tensors in (parameters, squared)]
    owned = [tensors[name] for tensors in by_latent for name in ("w_enc", "w_dec", "b_enc", "threshold")]
    correction = 1 / (1 - adam.beta2 ** (adam.step + 1))
    _update_latents[(len(touched),)](
        *owned, touched, *w_rounded, *pairs, sums.pairs, sums.near, sums.d_b_enc, sums.parallel, sums.near_d_f, penalty, segments,
        segment_sums, centred, errors, prefixes, rows, d_in, adam.step, math.log2(adam.beta2), 1 - adam.beta2, correction,
        adam.epsilon, adam.rate, adam.threshold_rate, bandwidth, ROOM, SEGMENT, groups, 8, tile_of(d_in),
    )  # fmt: skip


@jit
def _sum_through_encoder(partial, d_b_enc, w_enc, width, d, latents: constexpr, at_once: constexpr, tile: constexpr):
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float32)
    for first in range(0, latents, at_once):
        latent = tl.program_id(0) * latents + first + tl.arange(0, at_once)
        g = tl.load(d_b_enc + latent, latent < width, other=0.0)
        taken = (g != 0)[:, None] & (column < d)[None, :]
        w = tl.load(w_enc + latent[:, None].to(tl.int64) * d + column[None, :], taken, other=0.0)
        total += tl.sum(g[:, None] * w, 0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + column, total, column < d)


def sum_through_encoder(d_b_enc: Float32[Tensor, " d_sae"], w_enc: Float32[Tensor, "d_sae d_in"]) -> Float32[Tensor, " d_in"]:
    """The sum over latents of d_b_enc * w_enc, what they send to b_dec; rows of silent latents are not read."""
    width, d_in = w_enc.shape
    tile = min(256, tile_of(d_in))
    partial = w_enc.new_empty(blocks(width, LATENTS_AT_ONCE), d_in)
    grid = (partial.shape[0], blocks(d_in, tile))
    _sum_through_encoder[grid](partial, d_b_enc, w_enc, width, d_in, LATENTS_AT_ONCE, 16, tile)
    return partial.sum(0)
