"""Opening activations by what a person types: a folder, an address of shards, or servers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.activations.stream.source import Source

SERVERS = ("flight://", "flight+tls://")
"""How the address of activation servers begins."""


@contextmanager
def opened(place: str, *, journal: Path | None = None, trainer: str | None = None, roots: Path | None = None) -> Iterator[Source]:
    """The source at `place`: a folder's path, an fsspec address (s3://, gs://, http://, ...), or flight://HOST:PORT/SITE.

    `journal`, `trainer` and `roots` are for servers: with a journal, chunks are taken in any order. Raises what the sources do.
    """
    if not place.startswith(SERVERS):
        yield LocalSource(place)
        return
    order = "fixed" if journal is None else "any"
    with FlightSource(place, order=order, journal=journal, trainer=trainer, roots=roots) as source:
        yield source
