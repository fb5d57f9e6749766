"""What a harvest reports of massive rows: few, large, and the first thing to know of a site's activations."""

from collections.abc import Callable

from everyscope.activations.shards.norms import MAX_NORM
from everyscope.activations.shards.statistics import Statistics
from everyscope.base.progress import say

WORTH_TELLING = 0.01
"""Share of the sum of squares from which on massive rows are reported [1]."""
SHOWN = 3
"""Different tokens, and positions, that a line names at most."""


def tell_massive(site: str, statistics: Statistics, token_at: Callable[[int, int], str]) -> None:
    """A line on the rows that the default limit leaves out, where they matter; `token_at` spells the token at block, position."""
    massive = statistics.massive(MAX_NORM)
    if massive is None or massive.share_of_squares < WORTH_TELLING:
        return
    tokens = dict.fromkeys(token_at(block, position) for block, position in massive.places)
    positions = dict.fromkeys(position for _, position in massive.places)
    where = f"tokens {', '.join(map(repr, list(tokens)[:SHOWN]))}; positions {', '.join(map(str, list(positions)[:SHOWN]))}"
    if massive.coordinates:
        dimension, share = massive.coordinates[0]
        where += f"; dimension {dimension} holds {share:.0%} of it"
    say(
        f"  {site}: {massive.count:,} massive rows ({massive.share_of_rows:.2%}), above {MAX_NORM:g} times the median norm, hold"
        f" {massive.share_of_squares:.0%} of the sum of squares ({where}); max_norm leaves them out of training and metrics"
    )
