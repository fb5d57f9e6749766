"""Documents in another order: pieces of files by a hash, and the documents in them through a bounded buffer.

The order follows from the seed and the text alone, so a count of documents is a place in it, and reading from there repeats it.
"""

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

from everyscope.base.ids import unit_interval
from everyscope.text.documents import Document

BUFFER_DOCUMENTS = 1 << 13
"""Documents held at most [documents]."""
BUFFER_CHARACTERS = 1 << 26
"""Characters held at most, and one document more [characters]."""

Item = TypeVar("Item")


def permuted(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order that depends on the seed and their number."""
    return [items[number] for number in sorted(range(len(items)), key=lambda number: unit_interval(f"piece {seed} {number}"))]


def shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """Each document once: whenever the buffer is full, one of those in it, drawn by `seed`.

    Only `Random.random()` is used, for of all of Python's generators it alone promises the same numbers in every version.
    """
    random, buffer, size = Random(seed), list[Document](), 0

    def drawn() -> Document:
        place = int(random.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        return buffer.pop()

    for document in documents:
        buffer.append(document)
        size += len(document.text)
        while len(buffer) > BUFFER_DOCUMENTS or size > BUFFER_CHARACTERS:
            found = drawn()
            size -= len(found.text)
            yield found
    while buffer:
        yield drawn()
