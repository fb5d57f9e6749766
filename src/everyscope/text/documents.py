"""What a corpus is made of: documents, each a text or a conversation, with the content by which it is split."""

from dataclasses import dataclass
from typing import Any

from everyscope.base.ids import unit_interval
from everyscope.text.config import Split


@dataclass(frozen=True)
class Document:
    """One document: its name for people, its text, and the content whose hash decides its split."""

    name: str
    text: str
    """Of a conversation, what its messages say, line by line."""
    split_key: str
    messages: tuple[dict[str, Any], ...] | None = None
    """The messages of a conversation, as chat templates take them; None for plain text."""

    def split(self, held_out_fraction: float) -> Split:
        """`held_out` for about `held_out_fraction` of all documents, always the same ones."""
        return "held_out" if unit_interval(self.split_key) < held_out_fraction else "train"
