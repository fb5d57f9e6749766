"""The pair path's update on a GPU: one fused step of all that a latent owns, from the sums over its pairs."""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

import math
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float32, Int32, Int64
from torch import Tensor

from everyscope.sae.gpu_limits import SEGMENT
from everyscope.sae.kernels.gpu import ROOM
from everyscope.sae.kernels.gpu_sums import LatentSums, PairLists, errors_of, gradients_of, sum_segments
from everyscope.sae.kernels.gpu_triton import blocks, columns_of, constexpr, jit, tl

LATENTS_AT_ONCE = 256
"""Latents whose shares of b_dec's gradient are summed by one program."""


class AdamStep(NamedTuple):
    """Adam without momentum, at one step."""

    step: int
    """From 0."""
    beta2: float
    epsilon: float
    least_share: float
    """Of the current gradient, what its root of mean squares counts as at least, but for thresholds: 1 / largest_step, or 0."""
    rate: float
    threshold_rate: float
    direction_rate: float
    """For rows of W_dec as a whole; 0 moves their numbers each by `rate`."""
    follow: float
    """What a row of W_enc moves by, besides, of its direction's move."""


@jit
def _move(parameters, means, at, inside, gradient, along, decay, fresh, correction, epsilon, least, rate):
    """Adam's step of the parameters at some places, in memory; less `along` times themselves is their gradient."""
    old = tl.load(parameters + at, inside, other=0.0)
    gradient -= along * old
    squared = decay * tl.load(means + at, inside, other=0.0) + fresh * gradient * gradient
    new = old - rate * gradient / (tl.maximum(tl.sqrt(squared * correction), least * tl.abs(gradient)) + epsilon)
    tl.store(parameters + at, new, inside)
    tl.store(means + at, squared, inside)
    return tl.where(inside, new, 0.0)


@jit
def _round(w, rounded, at, inside, kept, lost):
    """Write w in bfloat16; the sums of squares `kept` and `lost` grow by w's and by those of what rounding takes."""
    half = w.to(tl.bfloat16)
    tl.store(rounded + at, half, inside)
    left = w - half.to(tl.float32)
    return kept + w * w, lost + left * left


@jit
def _turn_row(
    W_enc, W_dec, mean_of, turning, weights, rounded, row, d, squares, product, steep, decay, fresh, correction, epsilon, least,
    rate, follow, tile: constexpr,
):  # fmt: skip
    """Turn a direction by Adam on its whole row, and let its row of W_enc follow; the sums of squares that `_round` adds to.

    `turning` holds the gradient, `steep` its squared norm, `product` what it has in common with W_dec, `squares` W_dec's own.
    """
    mean = decay * tl.load(mean_of) + fresh * steep
    tl.store(mean_of, mean)
    factor = rate / (tl.maximum(tl.sqrt(mean * correction), least * tl.sqrt(steep)) + epsilon)
    length = tl.sqrt(squares + factor * (factor * steep - 2 * product))  # of W_dec less `factor` times its gradient
    kept = tl.zeros([tile], tl.float32)
    lost = tl.zeros([tile], tl.float32)
    for first in range(0, d, tile):
        column = first + tl.arange(0, tile)
        inside = column < d
        at = row * d + column
        old = tl.load(W_dec + at, inside, other=0.0)
        new = (old - factor * tl.load(turning + at, inside, other=0.0)) / length
        tl.store(W_dec + at, new, inside)
        w = tl.load(W_enc + at, inside, other=0.0) + follow * tl.load(weights + column, inside, other=0.0) * (new - old)
        tl.store(W_enc + at, w, inside)
        kept, lost = _round(w, rounded, at, inside, kept, lost)
    return kept, lost


@jit
def _update_latents(
    W_enc, W_dec, b_enc, threshold, v_W_enc, v_W_dec, v_b_enc, v_threshold, touched, w_rounded, w_norm, w_residual, start, row_of,
    pre_of, d_f_of, num_pairs, num_near, d_b_enc, parallel, near_d_f, penalty, segment_start, segment_sums, x, errors, prefixes,
    weights, turning, rows, d, step, log_beta2, fresh, correction, epsilon, least, rate, threshold_rate, direction_rate, follow,
    bandwidth, room, by_row: constexpr, segment: constexpr, groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(num_pairs + latent) == 0:
        return
    decay = tl.exp2(log_beta2 * (step + 1 - tl.load(touched + latent)).to(tl.float32))
    level = tl.load(threshold + latent)
    along = tl.load(parallel + latent)
    error = errors_of(latent, errors, prefixes, rows, d, groups)
    squares = tl.zeros([tile], tl.float32)
    product = tl.zeros([tile], tl.float32)
    steep = tl.zeros([tile], tl.float32)
    kept = tl.zeros([tile], tl.float32)
    lost = tl.zeros([tile], tl.float32)
    for first in range(0, d, tile):
        column = first + tl.arange(0, tile)
        inside = column < d
        at = latent * d + column
        g_enc, g_dec = gradients_of(
            latent, column, start, row_of, pre_of, d_f_of, x, error, level, segment_start, segment_sums, d, segment, pairs, tile
        )
        w = _move(W_enc, v_W_enc, at, inside, g_enc, 0.0, decay, fresh, correction, epsilon, least, rate)
        if by_row:
            old = tl.load(W_dec + at, inside, other=0.0)
            g_dec -= along * old
            tl.store(turning + at, g_dec, inside)
            squares += old * old
            product += old * g_dec
            steep += g_dec * g_dec
        else:
            kept, lost = _round(w, w_rounded, at, inside, kept, lost)
            w = _move(W_dec, v_W_dec, at, inside, g_dec, along, decay, fresh, correction, epsilon, least, rate)
            squares += w * w
    tl.debug_barrier()  # rows are read again, not necessarily by the threads that wrote them
    if by_row:
        kept, lost = _turn_row(
            W_enc, W_dec, v_W_dec + latent, turning, weights, w_rounded, latent, d, tl.sum(squares, 0), tl.sum(product, 0),
            tl.sum(steep, 0), decay, fresh, correction, epsilon, least, direction_rate, follow, tile,
        )  # fmt: skip
    else:
        length = tl.sqrt(tl.sum(squares, 0))
        for first in range(0, d, tile):
            column = first + tl.arange(0, tile)
            at = W_dec + latent * d + column
            tl.store(at, tl.load(at, column < d, other=0.0) / length, column < d)
    tl.store(w_norm + latent, tl.sqrt(tl.sum(kept, 0)) * room)
    tl.store(w_residual + latent, tl.sqrt(tl.sum(lost, 0)) * room)
    known = latent >= 0
    _move(b_enc, v_b_enc, latent, known, tl.load(d_b_enc + latent), 0.0, decay, fresh, correction, epsilon, least, rate)
    g = level * tl.load(near_d_f + latent) + tl.load(num_near + latent).to(tl.float32) * tl.load(penalty + latent) / rows
    w = _move(threshold, v_threshold, latent, known, -g / bandwidth, 0.0, decay, fresh, correction, epsilon, 0.0, threshold_rate)
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
    weights: Float32[Tensor, " d_in"],
    segment_sums: Float32[Tensor, "segments 2 d_in"],
    bandwidth: float,
    adam: AdamStep,
) -> None:
    """One step of each latent with pairs: gradients, projection, Adam, unit norm, thresholds, and the screen's copy of W_enc.

    Others are neither read nor written: their gradients are zero, and without momentum they do not move. `segment_sums` is
    scratch with room for one segment in SEGMENT pairs, `weights` are those of coordinates. `parameters` and `squared` hold W_enc
    [d_in, d_sae] by latent.
    """
    segments = sum_segments(lists, parameters["threshold"], centred, errors, prefixes, segment_sums)
    _update(
        parameters, squared, touched, w_rounded, lists, sums, penalty, segments, segment_sums, centred, errors, prefixes, weights,
        errors.shape[1], bandwidth, adam,
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
    weights: Float32[Tensor, " d_in"],
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
        parameters, squared, touched, w_rounded, empty, sums, penalty, segments, gradients, errors, errors, prefixes, weights,
        batch, bandwidth, adam,
    )  # fmt: skip


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
    weights: Tensor,
    rows: int,
    bandwidth: float,
    adam: AdamStep,
) -> None:
    groups, d_in = errors.shape[0], errors.shape[2]
    tile, warps = columns_of(d_in, 4)
    pairs = (lists.start, lists.row, lists.pre, lists.d_f)
    by_latent = [{**tensors, "W_enc": tensors["W_enc"].T} for tensors in (parameters, squared)]
    owned = [tensors[name] for tensors in by_latent for name in ("W_enc", "W_dec", "b_enc", "threshold")]
    correction, by_row = 1 / (1 - adam.beta2 ** (adam.step + 1)), adam.direction_rate > 0
    turning = torch.empty_like(parameters["W_dec"]) if by_row else errors  # directions' gradients; else not used
    _update_latents[(len(touched),)](
        *owned, touched, *w_rounded, *pairs, sums.pairs, sums.near, sums.d_b_enc, sums.parallel, sums.near_d_f, penalty, segments,
        segment_sums, centred, errors, prefixes, weights, turning, rows, d_in, adam.step, math.log2(adam.beta2), 1 - adam.beta2,
        correction, adam.epsilon, adam.least_share, adam.rate, adam.threshold_rate, adam.direction_rate, adam.follow, bandwidth,
        ROOM, by_row, SEGMENT, groups, 8, tile, num_warps=warps,
    )  # fmt: skip


@jit
def _sum_through_encoder(partial, d_b_enc, W_enc, width, d, latents: constexpr, at_once: constexpr, tile: constexpr):
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float32)
    for first in range(0, latents, at_once):
        latent = tl.program_id(0) * latents + first + tl.arange(0, at_once)
        g = tl.load(d_b_enc + latent, latent < width, other=0.0)
        taken = (g != 0)[:, None] & (column < d)[None, :]
        w = tl.load(W_enc + latent[:, None].to(tl.int64) * d + column[None, :], taken, other=0.0)
        total += tl.sum(g[:, None] * w, 0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + column, total, column < d)


def sum_through_encoder(d_b_enc: Float32[Tensor, " d_sae"], W_enc: Float32[Tensor, "d_sae d_in"]) -> Float32[Tensor, " d_in"]:
    """The sum over latents of d_b_enc * W_enc, what they send to b_dec; rows of silent latents are not read."""
    width, d_in = W_enc.shape
    tile, warps = columns_of(d_in, 4)
    partial = W_enc.new_empty(blocks(width, LATENTS_AT_ONCE), d_in)
    grid = (partial.shape[0], blocks(d_in, tile))
    _sum_through_encoder[grid](partial, d_b_enc, W_enc, width, d_in, LATENTS_AT_ONCE, 16, tile, num_warps=warps)
    return partial.sum(0)
