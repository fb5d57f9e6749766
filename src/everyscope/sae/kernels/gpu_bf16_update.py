"""The bfloat16 step's backward half on a GPU: one program per latent, which holds its rows in registers.

It goes through the latent's pairs once: each row's error times the direction is d_f, and at once that times the row of x and the
activation times the error are added to both gradients. Then it projects, moves by Adam and rounds, so that every row of state is
read and written once. A latent of many pairs leaves its further segments to programs of their own. Gradients that others have
summed, replicas or two dense products, come in as one such segment a latent, so that the update is the same code in all cases.
"""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

from typing import NamedTuple

from jaxtyping import BFloat16, Float32, Float64, Int32, Int64
from torch import Tensor

from everyscope.sae.kernels.gpu_bf16 import pair_at
from everyscope.sae.kernels.gpu_sums import errors_of
from everyscope.sae.kernels.gpu_triton import blocks, constexpr, jit, row_of_threads, tl, to_bfloat16

NUMBERS = ("steps", "correction", "rate", "threshold_rate", "direction_rate", "skip_rate", "sparsity")
"""What changes from step to step, in the device's memory, float64: the steps that will be done, Adam's correction of means that
began at zero, rates, the weight of sparsity. A kernel that took them as arguments could not be replayed."""


class Fixed(NamedTuple):
    """Numbers of a preset that no step changes."""

    fresh: float
    """1 - beta2."""
    log_decay: float
    """log2(beta2)."""
    epsilon: float
    least_share: float
    """1 / largest_step, or 0."""
    follow: float
    """What a row of W_enc moves by, besides, of its direction's move."""
    bandwidth: float
    by_row: bool
    """Whether a row of W_dec has one mean of squares."""


class Lists(NamedTuple):
    """The pairs of one batch by latent, rows ascending: those of latent i lie at [start[i], start[i + 1])."""

    start: Int64[Tensor, " d_sae_1"]
    row: Int32[Tensor, " room"]
    pre: Float32[Tensor, " room"]


class Segments(NamedTuple):
    """Sums over parts of latents' lists, those of latent i at [start[i], start[i + 1])."""

    start: Int64[Tensor, " d_sae_1"]
    W_enc: Float32[Tensor, "segments d_in"]
    W_dec: Float32[Tensor, "segments d_in"]
    """The gradient with its part along the latent's direction."""
    scalars: Float32[Tensor, "segments 2"]
    """d_f where active, and where near."""


class Batch(NamedTuple):
    """What gradients are made of."""

    centred: BFloat16[Tensor, "batch d_in"]
    errors: BFloat16[Tensor, "groups batch d_in"]
    prefixes: Int64[Tensor, " groups"]


class Weights(NamedTuple):
    """Both weights by latent, rounded."""

    enc: BFloat16[Tensor, "d_sae d_in"]
    dec: BFloat16[Tensor, "d_sae d_in"]


@jit
def _sums(begin, end, row_of, pre_of, x, error, w, level, half, d, column, inside, pairs: constexpr, tile: constexpr):
    """Both gradients of one latent from the pairs [begin, end), and d_f's sums where active and where near."""
    g_enc = tl.zeros([tile], tl.float32)
    g_dec = tl.zeros([tile], tl.float32)
    all_sent = tl.zeros([pairs], tl.float32)
    all_near = tl.zeros([pairs], tl.float32)
    for first in range(begin, end, pairs):
        pair = first + tl.arange(0, pairs)
        on = pair < end
        pre = tl.load(pre_of + pair, on, other=0.0)
        at = tl.load(row_of + pair, on, other=0).to(tl.int64)[:, None] * d + column[None, :]
        taken = on[:, None] & inside[None, :]
        e = tl.load(error + at, taken, other=0.0).to(tl.float32)
        centred = tl.load(x + at, taken, other=0.0).to(tl.float32)
        d_f = tl.sum(e * w[None, :], 1)
        active, near = pair_at(pre, level, half)
        sent = tl.where(on & active, d_f, 0.0)
        g_dec += tl.sum(tl.where(on & active, pre, 0.0)[:, None] * e, 0)
        g_enc += tl.sum(sent[:, None] * centred, 0)
        all_sent += sent
        all_near += tl.where(on & near, d_f, 0.0)
    return g_enc, g_dec, tl.sum(all_sent, 0), tl.sum(all_near, 0)


@jit
def _sum_segments(
    enc, dec, scalars, segment_start, start, row_of, pre_of, x, errors, prefixes, W_dec, threshold, width, d, rows, half, steps,
    segment: constexpr, is_whole: constexpr, groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    column = tl.arange(0, tile)
    inside = column < d
    count = width
    if not is_whole:
        count = tl.load(segment_start + width).to(tl.int32)
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        low = number
        begin = tl.load(start + low)
        end = tl.load(start + low + 1)
        if not is_whole:
            low = 0
            high = width
            for _ in range(steps):  # the last latent whose segments begin at or before this one
                middle = (low + high) // 2
                before = tl.load(segment_start + middle) <= number
                low = tl.where(before, middle, low)
                high = tl.where(before, high, middle)
            begin = tl.load(start + low) + (number - tl.load(segment_start + low) + 1) * segment
            end = tl.minimum(begin + segment, tl.load(start + low + 1))
        latent = tl.cast(low, tl.int64)
        error = errors_of(latent, errors, prefixes, rows, d, groups)
        w = tl.load(W_dec + latent * d + column, inside, other=0.0).to(tl.float32)
        level = tl.load(threshold + latent)
        g_enc, g_dec, sum_active, sum_near = _sums(
            begin, end, row_of, pre_of, x, error, w, level, half, d, column, inside, pairs, tile
        )
        at = tl.cast(number, tl.int64) * d + column
        tl.store(enc + at, g_enc, inside)
        tl.store(dec + at, g_dec, inside)
        tl.store(scalars + number * 2, sum_active)
        tl.store(scalars + number * 2 + 1, sum_near)


def sum_segments(
    segments: Segments,
    lists: Lists,
    batch: Batch,
    W_dec: BFloat16[Tensor, "d_sae d_in"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    segment: int,
    programs: int,
    is_whole: bool = False,
) -> None:
    """Fill in the sums of all segments but each latent's first, which `segments.start` counts; or of latents as a whole."""
    (width, d_in), (groups, rows, _) = W_dec.shape, batch.errors.shape
    tile, warps, pairs = row_of_threads(d_in)
    _sum_segments[(programs,)](
        segments.W_enc, segments.W_dec, segments.scalars, segments.start, *lists, *batch, W_dec, threshold, width, d_in, rows,
        bandwidth / 2, width.bit_length(), segment, is_whole, groups, pairs, tile, num_warps=warps,
    )  # fmt: skip


@jit
def _adam(old, mean_of, at, inside, gradient, decay, fresh, correction, epsilon, least, rate):
    """Adam's step of parameters in registers, whose means are in memory."""
    mean = decay * tl.load(mean_of + at, inside, other=0.0) + fresh * gradient * gradient
    tl.store(mean_of + at, mean, inside)
    return old - rate * gradient / (tl.maximum(tl.sqrt(mean * correction), least * tl.abs(gradient)) + epsilon)


@jit
def _move_rows(
    W_enc, W_dec, v_W_enc, v_W_dec, enc16, dec16, weights, latent, column, inside, d, g_enc, g_dec, sent, decay, fresh,
    correction, epsilon, least, rate, direction_rate, follow, by_row: constexpr,
):  # fmt: skip
    """A latent's step in both weights; what it sends to b_dec, by its row of W_enc as it was."""
    at = latent * d + column
    old = tl.load(W_dec + at, inside, other=0.0)
    g_dec = tl.where(inside, g_dec - tl.sum(old * g_dec, 0) * old, 0.0)
    if by_row:
        steep = tl.sum(g_dec * g_dec, 0)
        mean = decay * tl.load(v_W_dec + latent) + fresh * steep
        tl.store(v_W_dec + latent, mean)
        factor = direction_rate / (tl.maximum(tl.sqrt(mean * correction), least * tl.sqrt(steep)) + epsilon)
        new = old - factor * g_dec
    else:
        new = _adam(old, v_W_dec, at, inside, g_dec, decay, fresh, correction, epsilon, least, rate)
    new = tl.where(inside, new, 0.0)
    new = new / tl.sqrt(tl.sum(new * new, 0))
    tl.store(W_dec + at, new, inside)
    tl.store(dec16 + at, to_bfloat16(new), inside)
    turned = new - old
    old = tl.load(W_enc + at, inside, other=0.0)
    new = _adam(old, v_W_enc, at, inside, g_enc, decay, fresh, correction, epsilon, least, rate)
    if by_row:
        new += follow * tl.load(weights + column, inside, other=0.0) * turned
    tl.store(W_enc + at, new, inside)
    tl.store(enc16 + at, to_bfloat16(new), inside)
    return sent * old


@jit
def _update(
    W_enc, W_dec, b_enc, threshold, v_W_enc, v_W_dec, v_b_enc, v_threshold, touched, enc16, dec16, start, row_of, pre_of,
    segment_start, segment_enc, segment_dec, segment_scalars, x, errors, prefixes, num_pairs, num_near, penalty, weights, numbers,
    partial, width, d, rows, batch, fresh, log_decay, epsilon, least, follow, bandwidth, by_row: constexpr, segment: constexpr,
    groups: constexpr, pairs: constexpr, tile: constexpr,
):  # fmt: skip
    column = tl.arange(0, tile)
    inside = column < d
    done = tl.load(numbers).to(tl.int32)
    correction = tl.load(numbers + 1).to(tl.float32)
    rate = tl.load(numbers + 2).to(tl.float32)
    threshold_rate = tl.load(numbers + 3).to(tl.float32)
    direction_rate = tl.load(numbers + 4).to(tl.float32)
    to_b_dec = tl.zeros([tile], tl.float32)
    for number in range(tl.program_id(0), width, tl.num_programs(0)):
        if tl.load(num_pairs + number) > 0:
            latent = tl.cast(number, tl.int64)
            level = tl.load(threshold + latent)
            begin = tl.load(start + latent)
            end = tl.minimum(begin + segment, tl.load(start + latent + 1))
            error = errors_of(latent, errors, prefixes, rows, d, groups)
            w = tl.load(dec16 + latent * d + column, inside, other=0.0).to(tl.float32)
            g_enc, g_dec, sum_active, sum_near = _sums(
                begin, end, row_of, pre_of, x, error, w, level, bandwidth / 2, d, column, inside, pairs, tile
            )
            for further in range(tl.load(segment_start + latent), tl.load(segment_start + latent + 1)):  # int64, as its ends are
                g_enc += tl.load(segment_enc + further * d + column, inside, other=0.0)
                g_dec += tl.load(segment_dec + further * d + column, inside, other=0.0)
                sum_active += tl.load(segment_scalars + further * 2)
                sum_near += tl.load(segment_scalars + further * 2 + 1)
            decay = tl.exp2(log_decay * (done - tl.load(touched + latent)).to(tl.float32))
            to_b_dec += _move_rows(
                W_enc, W_dec, v_W_enc, v_W_dec, enc16, dec16, weights, latent, column, inside, d, g_enc, g_dec, sum_active, decay,
                fresh, correction, epsilon, least, rate, direction_rate, follow, by_row,
            )  # fmt: skip
            known = latent >= 0
            old = tl.load(b_enc + latent)
            tl.store(
                b_enc + latent, _adam(old, v_b_enc, latent, known, sum_active, decay, fresh, correction, epsilon, least, rate)
            )
            g = level * sum_near + tl.load(num_near + latent).to(tl.float32) * tl.load(penalty + latent) / batch
            g = -g / bandwidth
            new = _adam(level, v_threshold, latent, known, g, decay, fresh, correction, epsilon, 0.0, threshold_rate)
            # Below zero a threshold would let negative values pass. What is not a number stays, and is noticed.
            tl.store(threshold + latent, tl.where(new < 0, 0.0, new))
            tl.store(touched + latent, done)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + column, to_b_dec, inside)


def update_latents(
    parameters: dict[str, Tensor],
    squared: dict[str, Tensor],
    touched: Int32[Tensor, " d_sae"],
    rounded: Weights,
    lists: Lists,
    segments: Segments,
    batch: Batch,
    counts: Int32[Tensor, "3 d_sae"],
    penalty: Float32[Tensor, " d_sae"],
    weights: Float32[Tensor, " d_in"],
    numbers: Float64[Tensor, " numbers"],
    partial: Float32[Tensor, "programs d_in"],
    num_rows: int,
    fixed: Fixed,
    segment: int,
) -> None:
    """One step of each latent with pairs, in place, and of the rounded copies of its weights.

    Others are neither read nor written: their gradients are zero, and without momentum they do not move. `counts` are pairs,
    active and near ones over `num_rows` rows, `numbers` NUMBERS. `partial` gets, program by program, what latents send to b_dec:
    d_f where active times the row of W_enc before the step. `parameters` and `squared` hold W_enc [d_in, d_sae] by latent.
    """
    (width, d_in), (groups, rows, _) = rounded.dec.shape, batch.errors.shape
    tile, warps, pairs = row_of_threads(d_in)
    by_latent = [{**tensors, "W_enc": tensors["W_enc"].T} for tensors in (parameters, squared)]
    owned = [tensors[name] for tensors in by_latent for name in ("W_enc", "W_dec", "b_enc", "threshold")]
    _update[(len(partial),)](
        *owned, touched, *rounded, *lists, *segments, *batch, counts[0], counts[2], penalty, weights, numbers, partial, width,
        d_in, rows, float(num_rows), *fixed, segment, groups, pairs, tile, num_warps=warps,
    )  # fmt: skip


@jit
def _update_always(parameter, squared, gradient, fits, numbers, decay, fresh, epsilon, least, size, which_rate, tile: constexpr):
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = (at < size) & (tl.load(fits) != 0)
    old = tl.load(parameter + at, inside, other=0.0)
    correction = tl.load(numbers + 1).to(tl.float32)
    rate = tl.load(numbers + which_rate).to(tl.float32)
    g = tl.load(gradient + at, inside, other=0.0)
    tl.store(parameter + at, _adam(old, squared, at, inside, g, decay, fresh, correction, epsilon, least, rate), inside)


def update_always(
    parameter: Float32[Tensor, "*shape"],
    squared: Float32[Tensor, "*shape"],
    gradient: Float32[Tensor, "*shape"],
    fits: Tensor,
    numbers: Float64[Tensor, " numbers"],
    fixed: Fixed,
    rate: str,
) -> None:
    """Adam's step, by the rate of that name in NUMBERS, of what has a gradient at every step: bias and skip.

    None where `fits` [] is 0. All are contiguous.
    """
    size, which_rate = parameter.numel(), NUMBERS.index(rate)
    numbers_of_adam = (1 - fixed.fresh, fixed.fresh, fixed.epsilon, fixed.least_share)
    _update_always[(blocks(size, 256),)](parameter, squared, gradient, fits, numbers, *numbers_of_adam, size, which_rate, 256)
