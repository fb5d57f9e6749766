"""Activations from servers elsewhere, as a Source: the batches of a local folder or, in any order, those of the journal.

    source = FlightSource("flight://10.0.0.5:8815,10.0.0.6:8815/resid_post/layer_2", token=..., roots=...)

In fixed order one server gives the bits of `LocalSource`, and n servers those of `SlicedSource` with n slices. On the host of a
server the client reads the shards itself, where both sides allow it, and moves no bytes through a socket.
"""

import os
import re
import secrets
import threading
import weakref
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.statistics import Statistics
from everyscope.activations.stream.chunk_tracker import ChunkRequest, ChunkTracker
from everyscope.activations.stream.config import TOKEN_VARIABLE
from everyscope.activations.stream.journal import Journal
from everyscope.activations.stream.local import LocalSource
from everyscope.activations.stream.order import epoch_pieces
from everyscope.activations.stream.prefetch import FixedSequence, JournalledSequence, Sequence
from everyscope.activations.stream.rows import ChunkRows
from everyscope.activations.stream.servers import SliceServers, parse_url
from everyscope.activations.stream.sliced import SlicedSource, sequence_identity
from everyscope.activations.stream.source import Source
from everyscope.activations.stream.wire import NAME, LeaseRequest, Order, Ticket, pack_seen
from everyscope.base.errors import ConfigError
from everyscope.base.ids import content_id


class FlightSource:
    """Batches of one site from activation servers. `close` it, or use it in a `with` block."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        roots: Path | None = None,
        order: Order = "fixed",
        journal: Path | None = None,
        trainer: str | None = None,
        ahead: int = 4,
        deadline: float = 300.0,
        call_seconds: float = 30.0,
        use_files: bool = True,
        seed: int = 0,
    ) -> None:
        """Connect to all servers in `url`: flight://HOST:PORT[,HOST:PORT...]/SITE, or flight+tls:// with `roots` (PEM) to trust.

        `token` None takes EVERYSCOPE_TOKEN. Order "any" needs `journal`, a file of this trainer alone. `ahead` chunks are fetched
        before they are needed. A call ends after `call_seconds`; silence of a server for `deadline` is a StorageError [s].
        `use_files` False never reads a server's files, even on its host. `seed` is that of the jitter between tries.

        ConfigError for a wrong URL or token, StorageError where no server answers, DataError where they do not belong together.
        """
        if (order == "any") != (journal is not None):
            raise ConfigError(f"order={order!r} with journal={journal}: order any needs a journal, and order fixed has none")
        if trainer is not None and (len(trainer) > 128 or not re.fullmatch(NAME, trainer)):
            raise ConfigError(f"trainer={trainer!r}: expected at most 128 letters, digits and _ . - /, as in sweep/width_16k")
        certificates = None
        if roots is not None:
            try:
                certificates = roots.read_bytes()
            except OSError as error:
                raise ConfigError(f"{roots}: cannot be read ({error.strerror}); give a PEM file with certificates") from error
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._servers = SliceServers(parse_url(url), token, certificates, call_seconds, deadline, seed)
        known = self._servers.described
        self.d_in, self.num_rows, self.site = known.d_in, known.num_rows, known.site
        self.statistics = Statistics.of_record(known.statistics)
        self.chunks = self._servers.chunks
        self._files = self._servers.files() if use_files else None
        self._ahead = max(1, min(ahead, known.in_flight))
        self._order: Order = order
        self._trainer = trainer or f"trainer-{secrets.token_hex(4)}"
        self._tracker_lock, self._batch_lock = threading.Lock(), threading.Lock()
        self._tracker: ChunkTracker | None = None
        self._opened: set[tuple[int, int]] = set()
        self._plain: Source | None = None  # in fixed order files need neither servers nor chunks
        if self._files is not None and order == "fixed":
            folder, slices = self._files.folder, self.chunks.num_slices
            self._plain = LocalSource(folder) if slices == 1 else SlicedSource(folder, self.chunks.chunk_rows, slices)
        try:
            self.identity, self._sequence = self._start(journal, deadline, seed)
        except BaseException:
            self._servers.close()
            raise
        self._end = weakref.finalize(self, _end, self._sequence, self._servers)  # also where nobody closes it
        if not self.reads_files:
            threading.Thread(target=_stay, args=(self._servers, known.lease_seconds / 3), name="renew", daemon=True).start()

    @property
    def reads_files(self) -> bool:
        """Whether the shards are read here, without the servers."""
        return self._files is not None

    def batch(self, step: int, rows: int) -> Float[Tensor, "rows d_in"]:
        """Batch `step`, float32. StorageError after the deadline, DamagedData for shards that differ from their checksum."""
        if self._plain is not None:
            return self._plain.batch(step, rows)
        out, done = torch.empty(rows, self.d_in), 0
        num_chunks = self.chunks.num_chunks
        with self._batch_lock:
            places: list[int] = []
            for epoch, start, count in epoch_pieces(step, rows, self.num_rows):
                while count:
                    place, offset = self.chunks.place_of_row(start, self._sequence.short_place(epoch))
                    chunk = self._sequence.chunk(epoch * num_chunks + place)
                    if offset >= len(chunk):  # it came just now and is the short one: the row lies in the next
                        assert self._sequence.short_place(epoch) == place, f"row {start} of epoch {epoch} at {place}"
                        continue
                    places.append(epoch * num_chunks + place)
                    taken = min(count, len(chunk) - offset)
                    chunk.copy_into(out[done : done + taken], offset)
                    start, count, done = start + taken, count - taken, done + taken
            self._sequence.keep(places[0], places[-1])
        return out

    def places_identity(self) -> str:
        """A content id of which token each row is of, in the order of batches."""
        return self._servers.places()

    def close(self) -> None:
        """Give the leases back and end all threads; those in the middle of a call end with it."""
        self._end()

    def __enter__(self) -> "FlightSource":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, journal_path: Path | None, deadline: float, seed: int) -> tuple[str, Sequence]:
        known = self._servers.described
        if journal_path is None:
            return sequence_identity(known.identity, self.chunks), FixedSequence(self.chunks, self._certain, self._ahead)
        journal = Journal(journal_path, known.identity, self.chunks)
        self._tracker = ChunkTracker(self.chunks, journal.chunks)
        identity = content_id([known.identity, "any", self.chunks.chunk_rows, journal.id])
        sequence = JournalledSequence(
            self.chunks,
            journal,
            self._tracker,
            self._tracker_lock,
            self._certain,
            self._any_of,
            self._ahead,
            deadline,
            seed,
        )
        return identity, sequence

    def _certain(self, chunk: int) -> ChunkRows:
        """A certain chunk, from the files or from the server that holds it."""
        if self._files is not None:
            return self._files.read(chunk)
        part = self.chunks.owner(chunk)

        def fetch() -> ChunkRows:
            return self._servers.fetch(part, lambda lease: Ticket(lease=lease, chunk=chunk), lambda: self._request(part))[1]

        return self._servers.persist(self._servers.links[part], fetch)

    def _any_of(self, request: ChunkRequest) -> tuple[int, ChunkRows]:
        """Any chunk for a request; from the files the first that is neither here nor on its way."""
        if self._files is None:
            return self._servers.fetch(
                request.slice,
                lambda lease: Ticket(lease=lease, epoch=request.epoch, request=request.number),
                lambda: self._request(request.slice),
            )
        assert self._tracker is not None
        with self._tracker_lock:
            chunk = self._tracker.any_left(request, self._opened)
            self._opened = {opened for opened in self._opened if opened[0] >= self._tracker.epoch} | {(request.epoch, chunk)}
        return chunk, self._files.read(chunk)

    def _request(self, part: int) -> LeaseRequest:
        epoch, seen = 0, ""
        if self._tracker is not None:
            with self._tracker_lock:
                epoch, bits = self._tracker.seen(part)
            seen = pack_seen(bits)
        return LeaseRequest(trainer=self._trainer, site=self.site, order=self._order, epoch=epoch, seen=seen)


def _end(sequence: Sequence, servers: SliceServers) -> None:
    sequence.close()
    servers.close()


def _stay(servers: SliceServers, pause: float) -> None:
    """Keep the leases while the trainer computes."""
    while not servers.closing.wait(pause):
        servers.renew()
