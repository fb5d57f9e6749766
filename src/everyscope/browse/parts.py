"""The parts of an index, the suite's text and each of its SAEs: there or not yet. No page waits for a part it does not need."""

from pathlib import Path
from typing import Protocol

from everyscope.base.errors import EveryscopeError

TEXT = -1
"""The number of the text's part; those of SAEs are their places in suite.json."""
PATIENCE = 1.5
"""How long a page waits for a part before it says how far that is [s]."""


class Preparing(EveryscopeError):
    """A part that a page needs is not there yet."""

    def __init__(self, number: int) -> None:
        """Of the part `number`."""
        super().__init__("this part of the suite is being indexed; ask again in a moment")
        self.number = number


class Parts(Protocol):
    """Where an index finds its parts."""

    def require(self, number: int, seconds: float = PATIENCE) -> Path:
        """The database of a part, made ready if need be; Preparing where that takes longer."""
        ...

    def wish(self, number: int) -> None:
        """Make a part ready before others, without waiting for it."""
        ...
