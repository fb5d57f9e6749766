"""In which order a site's rows are read when several servers hold slices of them: pure functions, for servers and clients alike.

A chunk is `chunk_rows` consecutive rows; the last one of a site may be shorter. Slice i of n is a contiguous run of chunks, and
the order takes a chunk of each slice in turn, so that all servers of a site work at once. One slice is the plain order, whose
batches are those of `LocalSource`.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunks:
    """How the rows of one site are cut into chunks and slices, and the order in which an epoch takes the chunks."""

    num_rows: int
    """Rows of the site [rows]."""
    chunk_rows: int
    """Rows of a chunk; the last chunk may have fewer [rows]."""
    num_slices: int = 1
    """Contiguous slices, one a server [slices]."""

    def __post_init__(self) -> None:
        """Nothing that is not positive makes sense."""
        assert min(self.num_rows, self.chunk_rows, self.num_slices) > 0, self

    @property
    def num_chunks(self) -> int:
        """Chunks of the site [chunks]."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def missing_rows(self) -> int:
        """How many rows the last chunk has less than the others [rows]."""
        return self.num_chunks * self.chunk_rows - self.num_rows

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """The rows [start, stop) of a chunk."""
        assert 0 <= chunk < self.num_chunks, f"chunk {chunk} of {self.num_chunks}"
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.num_rows)

    def slice(self, index: int) -> range:
        """The chunks of slice `index`; sizes differ by one at most, and are 0 where there are more slices than chunks."""
        assert 0 <= index < self.num_slices, f"slice {index} of {self.num_slices}"
        return range(self.num_chunks * index // self.num_slices, self.num_chunks * (index + 1) // self.num_slices)

    def owner(self, chunk: int) -> int:
        """The slice that holds `chunk`."""
        return ((chunk + 1) * self.num_slices - 1) // self.num_chunks

    def at(self, place: int) -> int:
        """The chunk at `place` of an epoch: one of each slice in turn."""
        assert 0 <= place < self.num_chunks, f"place {place} of {self.num_chunks}"
        rounds, rest = divmod(self.num_chunks, self.num_slices)
        if place < rounds * self.num_slices:
            turn, index = divmod(place, self.num_slices)
            return self.slice(index)[turn]
        longer = [index for index in range(self.num_slices) if len(self.slice(index)) > rounds]
        assert len(longer) == rest
        return self.slice(longer[place - rounds * self.num_slices])[rounds]

    @property
    def short_place(self) -> int:
        """The place of the last chunk of the site: the only one that may be shorter."""
        last = self.num_slices - 1  # its slice, and the last chunk in it
        turn = len(self.slice(last)) - 1
        rounds, rest = divmod(self.num_chunks, self.num_slices)
        return turn * self.num_slices + last if turn < rounds else rounds * self.num_slices + rest - 1

    def place_of_row(self, row: int, short_place: int | None) -> tuple[int, int]:
        """Where row `row` of an epoch lies: the place of its chunk, and the row within the chunk.

        `short_place` is the place of the site's last chunk in this epoch, or None where it is known to come later.
        """
        place, offset = divmod(row, self.chunk_rows)
        if short_place is None or row < short_place * self.chunk_rows + self.chunk_rows - self.missing_rows:
            return place, offset
        return divmod(row + self.missing_rows, self.chunk_rows)


@dataclass(frozen=True)
class Span:
    """A stretch of one chunk within a batch."""

    epoch: int
    """Passes over the site before this one [epochs]."""
    place: int
    """Place of the chunk in its epoch."""
    start: int
    """First row within the chunk."""
    rows: int
    """How many [rows]."""


def epoch_pieces(step: int, rows: int, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Batch `step` as stretches (epoch, first row, number of rows), none of which crosses the end of an epoch."""
    assert step >= 0 < rows, f"step={step}, rows={rows}"
    epoch, start = divmod(step * rows, num_rows)
    while rows:
        count = min(rows, num_rows - start)
        yield epoch, start, count
        rows -= count
        epoch, start = epoch + 1, 0
