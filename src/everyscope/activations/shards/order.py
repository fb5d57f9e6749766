"""The order in which rows are shuffled: a pure function of a seed, the same on every machine."""

import numpy as np
from jaxtyping import Int, UInt64

ROUNDS = 6
"""Rounds of the Feistel network behind `scattered`; four would do with random functions, and ours are cheap."""


def permutation(num_rows: int, seed: int, index: int = 0) -> Int[np.ndarray, " rows"]:
    """All of 0 .. num_rows - 1 in an order that depends on `seed` and `index` alone.

    Sorted raw bits rather than `Generator.permutation`, because numpy promises to keep a bit generator's stream for ever
    but not the algorithms on top of it.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence([seed, index])).random_raw(num_rows), kind="stable")


def scattered(rows: Int[np.ndarray, " n"], num_rows: int, seed: int) -> Int[np.ndarray, " n"]:
    """Where each of `rows` goes in a shuffle of 0 .. num_rows - 1: a permutation of any size that is never held in memory.

    A Feistel network permutes the numbers below the next even power of two; what falls beyond `num_rows` is sent through
    again until it falls below, which keeps it a permutation (cycle walking; Black and Rogaway, CT-RSA 2002).
    """
    half = max(1, (max(num_rows - 1, 1).bit_length() + 1) // 2)
    keys = np.random.PCG64(np.random.SeedSequence([seed, num_rows])).random_raw(ROUNDS)
    found = np.array(rows, dtype=np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        found[walking] = _feistel(found[walking], np.uint64(half), keys)
        walking = walking[found[walking] >= num_rows]
    return found.astype(np.int64)


def _feistel(numbers: UInt64[np.ndarray, " n"], half: np.uint64, keys: UInt64[np.ndarray, " rounds"]) -> np.ndarray:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & low
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & low)
    return (left << half) | right


def _mixed(numbers: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64: every bit of the input touches every bit of the output."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
