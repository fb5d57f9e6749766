"""The GPU engine's limits in one place: its kernels use them, and so does who asks what memory a step takes. Torch-free."""

DENSE_SHARE, PAIRS_SHARE = 0.004, 0.003
"""Share of all (row, latent) that are pairs above which steps are dense, and below which they go by pairs. A pair's gathers take
as long as 1 / 0.004 entries of a product: arithmetic for an H100, not a measurement [1]."""
ROOM = 4
"""Lists have room for this many times the pairs at which steps become dense [1]."""
LEAST_ROOM = 4096
"""And for at least this many [pairs]."""
SEGMENT = 512
"""Pairs of a latent that one program sums [pairs]."""


def list_room(rows: int, width: int) -> int:
    """Pairs for which the lists of one step have room, for `rows` rows and `width` latents on one device [pairs]."""
    return max(LEAST_ROOM, int(ROOM * DENSE_SHARE * rows * width))


# Of the bfloat16 engine, whose choice between both ways is measured (sae/crossover.py).
SHARE_ROOM, ROW_ROOM = 0.05, 1024
"""Its lists have room for this share of all (row, latent), but not for more than so many a row [1, pairs]."""
ROUNDED_SEGMENT = 256
"""Pairs of a latent that one of its programs sums [pairs]."""

APART = 2**22
"""Pre-activations of a step up to which SAEs of a training group step side by side, each in memory of its own [numbers]."""


def steps_apart(rows: int, width: int) -> bool:
    """Whether an SAE is too small to fill a GPU, so that others step beside it."""
    return rows * width <= APART


def rounded_list_room(rows: int, width: int) -> int:
    """Pairs for which the bfloat16 engine's lists have room, for `rows` rows and `width` latents on one device [pairs]."""
    return max(LEAST_ROOM, int(rows * min(SHARE_ROOM * width, ROW_ROOM)))
