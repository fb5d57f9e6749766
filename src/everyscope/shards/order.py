"""The order in which rows are shuffled: a pure function of a seed, the same on every machine."""

import numpy as np
from jaxtyping import Int


def permutation(num_rows: int, seed: int, index: int = 0) -> Int[np.ndarray, " rows"]:
    """All of 0 .. num_rows - 1 in an order that depends on `seed` and `index` alone.

    Sorted raw bits rather than `Generator.permutation`, because numpy promises to keep a bit generator's stream for ever
    but not the algorithms on top of it.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence([seed, index])).random_raw(num_rows), kind="stable")
