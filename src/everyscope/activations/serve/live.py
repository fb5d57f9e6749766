"""An origin without a disk: chunks of activations that a language model makes when trainers ask for them.

A model gives all sites, and a whole shuffled bucket of rows, in one go; so a group is what a bucket completes, at all sites. The
ring keeps what of it a trainer may still want (`hold_seconds`), and asks for the next bucket only when someone waits for it: the
model runs as fast as trainers consume. A bucket that was dropped and is asked for again, by a laggard or in the next
epoch, is computed again, to the same bits. Beside the ring's buffer, memory holds the last bucket that was made, at all sites.
"""

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.leases import ChunkKey
from everyscope.activations.serve.origin import SiteFacts
from everyscope.activations.shards.format import CARRIER, RowDtype
from everyscope.activations.shards.statistics import Statistics
from everyscope.activations.stream.order import Chunks
from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.base.ids import content_id

BUCKETS_HELD = 2
"""Buckets that a buffer must hold: the one that trainers are in, and the next."""


class Buckets(Protocol):
    """Rows as a model makes them: bucket by bucket, all sites at once. Used by one thread at a time."""

    @property
    def identity(self) -> str:
        """A content id of all rows in their order, at all sites together."""
        ...

    @property
    def dtype(self) -> RowDtype:
        """Number format of the rows."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Size of the activations, by site [d_in]."""
        ...

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """Figures of the first bucket's rows, by site."""
        ...

    @property
    def borders(self) -> Sequence[int]:
        """The row at which each bucket begins, and the one at which the last ends [rows]."""
        ...

    def rows(self, bucket: int) -> Mapping[str, np.ndarray]:
        """The rows of a bucket by site, in the carrier type [rows, d_in]."""
        ...


class LiveOrigin:
    """Chunks cut from buckets. A chunk that begins in one bucket and ends in the next comes out with the next."""

    def __init__(self, buckets: Buckets, config: ServeConfig) -> None:
        """Of `config` the slice and chunk_rows are taken. Nothing is made yet but what gives the statistics.

        ConfigError where the buffer does not hold two buckets of the slice, or for several reading threads.
        """
        self._buckets, self._borders = buckets, list(buckets.borders)
        self._chunks = Chunks(self._borders[-1], config.chunk_rows, config.slice_count)
        self._held = self._chunks.slice(config.slice_index)
        self._require_room(config)
        self.sites = {
            site: SiteFacts(
                num_rows=self._borders[-1],
                d_in=width,
                dtype=buckets.dtype,
                identity=f"{buckets.identity}:{site}",
                statistics=buckets.statistics[site],
                folder=None,
            )
            for site, width in buckets.widths.items()
        }
        self._places = content_id([buckets.identity, "places"])
        self._lock = threading.Lock()
        self._last: tuple[int, Mapping[str, np.ndarray]] = (-1, {})

    def group(self, key: ChunkKey) -> tuple[ChunkKey, ...]:
        """All chunks of the slice that end in the same bucket, at all sites."""
        return tuple(ChunkKey(site, chunk) for chunk in self._ending_in(self._ends_in(key.chunk)) for site in self.sites)

    def places(self, site: str) -> str:
        """The same for every site: a pass of the model makes a row of each."""
        return self._places

    def read(self, key: ChunkKey) -> Mapping[ChunkKey, np.ndarray]:
        """Make the group's rows; the buckets before are made too where their last rows are needed and not in memory."""
        with self._lock:
            bucket = self._ends_in(key.chunk)
            chunks = self._ending_in(bucket)
            begin, border = self._chunks.rows_of(chunks[0])[0], self._borders[bucket]
            earlier = self._rows_before(begin, bucket)
            rows, found = self._made(bucket), {}
            for site in self.sites:
                for chunk in chunks:
                    start, stop = self._chunks.rows_of(chunk)
                    own = rows[site][max(start - border, 0) : stop - border]
                    parts = [table[site] for table in earlier] if start < border else []
                    # Copies: a chunk that is replaced gives its memory back, whatever else the bucket holds.
                    found[ChunkKey(site, chunk)] = np.concatenate([*parts, own])
            return found

    def close(self) -> None:
        """Forget the last bucket."""
        self._last = (-1, {})

    def _rows_before(self, begin: int, bucket: int) -> list[dict[str, np.ndarray]]:
        """The rows from `begin` on that lie in buckets before `bucket`: of one, or of several where a chunk is so large."""
        found = []
        for number in range(bisect_right(self._borders, begin) - 1, bucket):
            skipped = max(begin - self._borders[number], 0)
            found.append({site: rows[skipped:].copy() for site, rows in self._made(number).items()})
        return found

    def _ends_in(self, chunk: int) -> int:
        """The bucket that holds the last row of `chunk`."""
        return bisect_right(self._borders, self._chunks.rows_of(chunk)[1] - 1) - 1

    def _ending_in(self, bucket: int) -> range:
        """The chunks of the slice whose last row lies in `bucket`."""
        first, last = self._borders[bucket], self._borders[bucket + 1]
        rows = self._chunks.chunk_rows
        stop = self._chunks.num_chunks if last == self._borders[-1] else last // rows
        return range(max(first // rows, self._held.start), min(stop, self._held.stop))

    def _made(self, bucket: int) -> Mapping[str, np.ndarray]:
        """The rows of a bucket. The last one made is kept: for a chunk that continues in the next, and for a site whose
        first trainer comes a little later.
        """
        if self._last[0] != bucket:
            self._last = (-1, {})  # before the next is made, or both were in memory
            self._last = (bucket, self._buckets.rows(bucket))
        return self._last[1]

    def _require_room(self, config: ServeConfig) -> None:
        if config.read_threads > 1:
            raise ConfigError(f"read_threads={config.read_threads}: a model makes one bucket at a time; leave it out")
        widths = self._buckets.widths
        largest = min(config.chunk_rows, self._borders[-1]) * max(widths.values()) * CARRIER[self._buckets.dtype].itemsize
        chunks = max(len(self._ending_in(bucket)) for bucket in range(len(self._borders) - 1))
        needed = BUCKETS_HELD * chunks * len(widths) * largest
        if config.buffer_bytes < needed:
            size = human_bytes(needed // BUCKETS_HELD)
            raise ConfigError(
                f"buffer_bytes={config.buffer_bytes}: does not hold two buckets of {size}, the one in use and the next; "
                f"set buffer_bytes={needed} or more, or make buckets smaller with --harvest.bucket-rows"
            )
