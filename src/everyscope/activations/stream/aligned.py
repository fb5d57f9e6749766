"""Rows of several sites together: row by row, what one harvest saw at each of them on the same token.

One harvest writes all its sites in one order, so that the same row number is the same token. That is not taken on trust: rows of
shards are read with the block and the position that each is from, and these must be equal. Servers say once for all rows, by a
content id, which blocks and positions these are.
"""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.activations.stream.source import Source
from everyscope.base.errors import DataError, ShapeMismatch
from everyscope.base.ids import content_id

REMEDY = "harvest both sites in one run, and train from these shards"


@runtime_checkable
class Placed(Protocol):
    """A source that knows which token each row is of."""

    def places(self, step: int, rows: int) -> Int[Tensor, "2 rows"]:
        """Of the rows of a batch: the block of the harvest, and the position in it."""
        ...


@runtime_checkable
class Placeable(Protocol):
    """A source that can say for all its rows at once which tokens they are of."""

    def places_identity(self) -> str:
        """A content id, equal for rows of the same tokens in the same order."""
        ...


class Aligned:
    """Sources of several sites, read together; the first is what is read of the model, the others what is to be predicted."""

    def __init__(self, *sources: Source) -> None:
        """ShapeMismatch where they have other numbers of rows, or other positions, and so are of different harvests.

        DataError where servers, or a server and shards, give rows of other tokens, or in another order.
        """
        first = sources[0]
        for source in sources[1:]:
            if source.num_rows != first.num_rows:
                raise ShapeMismatch(f"two sites have {first.num_rows} and {source.num_rows} rows, expected as many; {REMEDY}")
            if not np.array_equal(source.statistics.position_count, first.statistics.position_count):
                raise ShapeMismatch(f"two sites have rows at other positions, expected rows of the same tokens; {REMEDY}")
        if not all(isinstance(source, Placed) for source in sources):  # whose rows are compared as they are read
            known = {source.places_identity() for source in sources if isinstance(source, Placeable)}
            if len(known) > 1:
                raise DataError(f"two sites give rows of other tokens, or in another order; {REMEDY}, served alike")
        self.sources, self.num_rows = sources, first.num_rows
        self.identity = content_id([source.identity for source in sources])

    def rows(self, step: int, rows: int) -> tuple[Float[Tensor, "rows _"], ...]:
        """Batch `step` of every source, float32; DataError where two rows of one number are of different tokens."""
        placed = [source.places(step, rows) for source in self.sources if isinstance(source, Placed)]
        for places in placed[1:]:
            if (places != placed[0]).any():
                at = int((places != placed[0]).any(0).int().argmax())
                one, other = (tuple(side[:, at].tolist()) for side in (placed[0], places))
                raise DataError(
                    f"row {(step * rows + at) % self.num_rows} is of block {one[0]}, position {one[1]} at one site and of block "
                    f"{other[0]}, position {other[1]} at the other; {REMEDY}"
                )
        return tuple(source.batch(step, rows) for source in self.sources)
