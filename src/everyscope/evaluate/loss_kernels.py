"""Losses and divergences of one row of logits after another, compiled by numba: a row and its exponentials stay in the cache.

Logits are float32, or bfloat16 as bits (uint16), [tokens, vocab]; a row's normaliser is its largest logit and the logarithm of
the sum of exp(logit - largest). Sums are float32 within BLOCK columns, in an order fixed at compile time, then float64:
what comes out depends neither on other rows nor on threads. NaN and infinity come out as NaN.
"""

import numba
import numpy as np
from numba import types
from numba.extending import overload

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
compiled = numba.njit(**OPTIONS, fastmath={"reassoc", "contract", "nsz"})
inlined = numba.njit(**OPTIONS, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
in_order = numba.njit(**OPTIONS, fastmath={"contract"}, forceinline=True)
"""For what reassociation would spoil."""
BLOCK = 1 << 11
"""Columns that are summed in float32."""
INFINITE, LEAST_INFINITE = np.int32(0x7F800000), np.int32(-0x7F800001)
"""Infinity and its negative as integers that are ordered like numbers; NaN lies beyond."""
LEAST = np.float32(-87.0)
"""exp of less is taken for exp of this, 1.6e-38."""
PER_OCTAVE = np.float32(1.4426950408889634)
LOG_2, LOG_2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""The logarithm of 2 in two parts, the first of few enough bits that its multiples are exact."""
HALF, ONE = np.float32(0.5), np.float32(1.0)
TERMS = tuple(np.float32(1.0 / factorial) for factorial in (5040, 720, 120, 24, 6))


def widened(value):
    """The float32 of a logit."""
    raise NotImplementedError("for compiled code")


@overload(widened, inline="always")
def _widened(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.int32(np.int32(value) << np.int32(16)).view(np.float32)


@in_order
def exponential(x):
    """exp(x) for float32 x <= 0, to two units in the last place; the logarithm of 2 is taken off until |x| <= log(2) / 2."""
    x = x if x > LEAST else LEAST
    octaves = np.floor(x * PER_OCTAVE + HALF)
    rest = (x - octaves * LOG_2) - octaves * LOG_2_REST
    total = TERMS[0]
    for place in range(1, 5):
        total = total * rest + TERMS[place]
    total = (total * rest + HALF) * rest * rest + rest + ONE
    return total * np.int32((np.int32(octaves) + np.int32(127)) << np.int32(23)).view(np.float32)


@inlined
def ordered(bits):
    """The bits of a float32 as an integer that grows with it, or such an integer as bits: the map is its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def widen(row, scratch):
    """Write the row's float32 into `scratch` [vocab]; return the largest, or NaN where one is NaN or infinite."""
    most, least = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
    for column in range(row.shape[0]):
        value = np.float32(widened(row[column]))
        scratch[column] = value
        key = ordered(value.view(np.int32))
        most = key if key > most else most
        least = key if key < least else least
    if most >= INFINITE or least <= LEAST_INFINITE:
        return np.float32(np.nan)
    return np.int32(ordered(np.int32(most))).view(np.float32)


@inlined
def sum_exponentials(some, top):
    """Take `top` off some columns and return the sum of their exponentials."""
    total = np.float32(0)
    for column in range(some.shape[0]):
        less = some[column] - top
        some[column] = less
        total += exponential(less)
    return total


@inlined
def normalise(row, scratch):
    """Write the row's float32 less its largest logit into `scratch` [vocab]; return that logit and the log of the sum of exp.

    Both are NaN where the row holds NaN or infinity.
    """
    top, total = widen(row, scratch), 0.0
    for block in range(0, row.shape[0], BLOCK):
        total += np.float64(sum_exponentials(scratch[block : block + BLOCK], top))
    return top, np.float32(np.log(total))


@compiled
def normalisers_of(logits, start, stop, tops, log_sums):
    """The normalisers of rows `start` to `stop`, into `tops` and `log_sums`, float32 [tokens]."""
    scratch = np.empty(logits.shape[1], np.float32)
    for token in range(start, stop):
        tops[token], log_sums[token] = normalise(logits[token], scratch)


@compiled
def losses_of(logits, rows, targets, start, stop, losses):
    """-log q of the target at positions `start` to `stop`, whose logits are at `rows`; into `losses`, float32 [positions]."""
    scratch = np.empty(logits.shape[1], np.float32)
    for position in range(start, stop):
        _, log_sum = normalise(logits[rows[position]], scratch)
        losses[position] = log_sum - scratch[targets[position]]


@in_order
def divergence_term(clean, top, log_sum, ours, our_log_sum):
    """The term q - p - p (log q - log p), at least 0; rounded alike on both sides, so that equals give exactly 0."""
    log_p, log_q = (widened(clean) - top) - log_sum, ours - our_log_sum
    p = exponential(log_p)
    term = (exponential(log_q) - p) - (log_q - log_p) * p
    return term if term > 0 else np.float32(0)


@inlined
def sum_divergences(clean, top, log_sum, ours, our_log_sum):
    """The divergence's terms of some columns; `ours` are logits less their largest."""
    total = np.float32(0)
    for column in range(clean.shape[0]):
        total += divergence_term(clean[column], top, log_sum, ours[column], our_log_sum)
    return total


@compiled
def losses_and_divergences_of(logits, clean, tops, log_sums, rows, targets, start, stop, losses, divergences):
    """Losses of `logits` and KL(clean || logits), by `losses.kl_divergence`'s sum, at positions `start` to `stop`.

    `tops` and `log_sums` are the normalisers of `clean`, by row.
    """
    scratch = np.empty(logits.shape[1], np.float32)
    for position in range(start, stop):
        row = rows[position]
        top, log_sum = normalise(logits[row], scratch)
        losses[position] = log_sum - scratch[targets[position]]
        total = np.float64(top * np.float32(0) + tops[row] * np.float32(0))  # NaN where either row is not finite
        for block in range(0, scratch.shape[0], BLOCK):
            some = slice(block, block + BLOCK)
            total += np.float64(sum_divergences(clean[row, some], tops[row], log_sums[row], scratch[some], log_sum))
        divergences[position] = total
