"""Where training gets activations from: one small protocol, so that a trainer knows no storage and no wire."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.statistics import Statistics


class Source(Protocol):
    """An endless sequence of batches of one site's activations.

    Batches are pure functions of their number, so a trainer resumes by counting its steps and no source has state to save.
    """

    @property
    def d_in(self) -> int:
        """Size of the activations."""
        ...

    @property
    def num_rows(self) -> int:
        """Distinct rows; batches beyond them start over [rows]."""
        ...

    @property
    def statistics(self) -> Statistics:
        """Figures over all rows, in the activations' own units."""
        ...

    @property
    def identity(self) -> str:
        """A content id: equal for equal activations in equal order."""
        ...

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch number `step` (from 0) of `rows` raw activations, float32: rows step * rows onwards, modulo `num_rows`."""
        ...
