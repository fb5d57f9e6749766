"""Shards on this machine, read chunk by chunk in the order of several servers: what a client of them gets, without them."""

import threading
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.reader import Shards
from everyscope.activations.stream.order import Chunks, Span, epoch_pieces
from everyscope.activations.stream.rows import ChunkRows
from everyscope.base.ids import content_id

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """A word that two processes share if they run on one host since its last start; None where there is none."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def sequence_identity(identity: str, chunks: Chunks) -> str:
    """The identity of a site's rows in the order of `chunks.num_slices` slices; one slice is the shards' own order."""
    if chunks.num_slices == 1:
        return identity
    return content_id([identity, "sliced", chunks.chunk_rows, chunks.num_slices])


def chunk_spans(chunks: Chunks, step: int, rows: int) -> list[Span]:
    """Batch `step` in fixed order, as stretches of chunks."""
    found = []
    for epoch, start, count in epoch_pieces(step, rows, chunks.num_rows):
        while count:
            place, offset = chunks.place_of_row(start, chunks.short_place)
            first, stop = chunks.rows_of(chunks.at(place))
            taken = min(count, stop - first - offset)
            found.append(Span(epoch, place, offset, taken))
            start, count = start + taken, count - taken
    return found


class ChunkFiles:
    """Chunks of a site's shards; several threads may read at once."""

    def __init__(self, folder: Path, chunks: Chunks) -> None:
        """Open a finished site folder; DataError where it has not been finished."""
        self.folder, self.shards = folder, Shards(folder)
        self._chunks, self._lock = chunks, threading.Lock()

    def read(self, chunk: int) -> ChunkRows:
        """A chunk; DamagedData, naming the shard, where it is not what was written."""
        with self._lock:  # the reader keeps few shards open, and closes others while it reads
            return ChunkRows([self.shards.rows(*self._chunks.rows_of(chunk))])


class SlicedSource:
    """The shards of one site, in the order in which `num_slices` servers give them; one slice is `LocalSource`'s order."""

    def __init__(self, folder: Path, chunk_rows: int, num_slices: int) -> None:
        """Open a finished site folder; DataError where it has not been finished."""
        shards = Shards(folder)
        self._chunks = Chunks(shards.num_rows, chunk_rows, num_slices)
        self._shards = shards
        self.d_in, self.num_rows, self.statistics = shards.d_in, shards.num_rows, shards.statistics
        self.identity = sequence_identity(shards.identity, self._chunks)

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32; DamagedData, naming the shard, where its bytes differ from their checksum."""
        out, done = torch.empty(rows, self.d_in), 0
        for span in chunk_spans(self._chunks, step, rows):
            start = self._chunks.rows_of(self._chunks.at(span.place))[0] + span.start
            self._shards.rows_into(start, start + span.rows, out[done : done + span.rows])
            done += span.rows
        return out
