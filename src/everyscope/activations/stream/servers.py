"""All servers of one site as one: found, compared, leased from, asked again until they answer or the deadline passes."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from everyscope.activations.stream.link import LeaseLost, Link, NotYet, Unreachable
from everyscope.activations.stream.order import Chunks
from everyscope.activations.stream.rows import ChunkRows
from everyscope.activations.stream.sliced import ChunkFiles, boot_id, sequence_identity
from everyscope.activations.stream.wire import Described, Leased, LeaseRequest, Ticket
from everyscope.base.errors import ConfigError, DataError, EveryscopeError, StorageError

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Pauses between tries, doubled each time [s]."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Address:
    """Where servers listen, and which site is wanted of them."""

    locations: tuple[str, ...]
    """Servers, as Flight names them."""
    site: str
    """The site's folder name."""


def parse_url(url: str) -> Address:
    """`flight://host:port[,host:port...]/site`, or `flight+tls://`; ConfigError for anything else."""
    scheme, separator, rest = url.partition("://")
    hosts, _, site = rest.partition("/")
    named = [host for host in hosts.split(",") if host]
    has_ports = all(host.rpartition(":")[0] and host.rpartition(":")[2].isdigit() for host in named)
    if scheme not in ("flight", "flight+tls") or not separator or not named or not site.strip("/") or not has_ports:
        raise ConfigError(
            f"{url!r} names no activation server; expected flight://HOST:PORT[,HOST:PORT...]/SITE (or flight+tls://), "
            "as in flight://127.0.0.1:8815/resid_post/layer_2"
        )
    if len(set(named)) < len(named):
        raise ConfigError(f"{url!r} names a server twice; name each once")
    transport = "grpc+tls" if scheme == "flight+tls" else "grpc+tcp"
    return Address(tuple(f"{transport}://{host}" for host in named), site.strip("/"))


class Pauses:
    """How long to wait before each new try: longer and longer, with jitter so that many clients do not come back as one."""

    def __init__(self, seed: int) -> None:
        """The jitter is a function of `seed`."""
        self._random, self._next = random.Random(seed), FIRST_PAUSE

    def next(self) -> float:
        """The next pause [s]."""
        pause = self._next * (0.5 + self._random.random() / 2)
        self._next = min(2 * self._next, LONGEST_PAUSE)
        return pause


class SliceServers:
    """The servers of one site, by slice. Threads may share it."""

    def __init__(
        self, address: Address, token: str | None, roots: bytes | None, call_seconds: float, deadline: float, seed: int
    ) -> None:
        """Ask all what they hold; StorageError where one is silent for `deadline` [s], DataError where they disagree."""
        self._deadline, self._seed, self._tries = deadline, seed, 0
        self.closing = threading.Event()
        links = [Link(location, token, roots, call_seconds) for location in address.locations]
        try:
            here = boot_id()
            answers = [self.persist(link, lambda link=link: link.describe(address.site, here)) for link in links]
            self.links = _by_slice(links, answers)
        except BaseException:
            for link in links:
                link.close()
            raise
        self.described = next(answer for answer in answers if answer.slice_index == 0)
        self.folders = tuple(Path(answer.folder) for answer in answers if answer.folder is not None)
        self.chunks = Chunks(self.described.num_rows, self.described.chunk_rows, self.described.slice_count)

    def files(self) -> ChunkFiles | None:
        """The same chunks from a folder on this host, where a server named one that this process can open."""
        for folder in self.folders:
            try:
                files = ChunkFiles(folder, self.chunks)
            except (EveryscopeError, OSError):
                continue  # on this host, but not for us to read
            if files.shards.identity == self.described.identity:
                return files
        return None

    def fetch(self, slice: int, ticket: Callable[[str], Ticket], request: Callable[[], LeaseRequest]) -> tuple[int, ChunkRows]:
        """One try to get a chunk from a slice's server, under a lease: which it is, and its rows.

        `ticket` is made for a lease, `request` for a new one. Unreachable, NotYet, LeaseLost; an EveryscopeError is final.
        """
        link = self.links[slice]
        lease = link.lease(request, lambda leased: self._check(link, slice, leased))
        asked = ticket(lease.lease)
        try:
            head, rows = link.chunk(asked)
        except LeaseLost:
            link.forget(lease)
            raise
        want = self.described
        first, stop = self.chunks.rows_of(head.chunk) if head.chunk < self.chunks.num_chunks else (0, 0)
        got = (head.identity, head.site, head.d_in, head.dtype, head.rows)
        if got != (want.identity, want.site, want.d_in, want.dtype, stop - first) or asked.chunk not in (None, head.chunk):
            raise DataError(f"{link.location}: sent chunk {head.chunk} of other activations; restart it with the same shards")
        return head.chunk, rows

    def persist(self, link: Link, call: Callable[[], Result]) -> Result:
        """Call until it answers; StorageError once the server has been silent for the deadline."""
        last_answer, self._tries = time.monotonic(), self._tries + 1
        pauses = Pauses(self._seed * 1_000_003 + self._tries)
        while True:
            try:
                return call()
            except NotYet:
                last_answer = time.monotonic()
                pauses = Pauses(self._seed * 1_000_003 + self._tries)
            except LeaseLost as error:
                self.require_answer(last_answer, link.location, error)
            except Unreachable as error:
                self.require_answer(last_answer, link.location, error)
            if self.closing.wait(pauses.next()):
                raise StorageError(f"{link.location}: the source was closed while it waited")

    def require_answer(self, last_answer: float, location: str, error: Exception | None) -> None:
        """StorageError where the last answer came longer than the deadline ago; `last_answer` as time.monotonic() [s]."""
        if time.monotonic() - last_answer > self._deadline:
            raise StorageError(
                f"{location}: no answer for {self._deadline:g} s ({error}); start the server again, then the same command"
            ) from error

    def places(self) -> str:
        """A content id of which token each row is of, in the order in which the slices give them."""
        link = self.links[0]
        places = self.persist(link, lambda: link.places(self.described.site))
        return sequence_identity(places, self.chunks)

    def renew(self) -> None:
        """Tell all servers that we are still here; who does not hear it is not waited for."""
        for link in self.links:
            try:
                link.renew()
            except (Unreachable, NotYet, EveryscopeError):
                continue  # the next request to the server meets the same error and can say what it was for

    def close(self) -> None:
        """Give leases back and hang up."""
        self.closing.set()
        for link in self.links:
            link.close()

    def _check(self, link: Link, slice: int, leased: Leased) -> None:
        want = self.described
        got = (leased.identity, leased.slice_index, leased.slice_count, leased.chunk_rows)
        if got != (want.identity, slice, want.slice_count, want.chunk_rows):
            raise DataError(
                f"{link.location}: restarted with other shards, slice or chunk_rows; restart it with its former settings"
            )


def _by_slice(links: Sequence[Link], answers: Sequence[Described]) -> list[Link]:
    """The links in order of slices; DataError where they do not hold one site together."""
    first = answers[0]
    for link, answer in zip(links, answers, strict=True):
        for name in ("identity", "num_rows", "d_in", "dtype", "chunk_rows", "slice_count"):
            got, want = getattr(answer, name), getattr(first, name)
            if got != want:
                raise DataError(
                    f"{link.location}: has {name}={got}, {links[0].location} has {want}; "
                    "serve the same shards with the same chunk_rows and slices"
                )
    held = sorted(answer.slice_index for answer in answers)
    if held != list(range(first.slice_count)):
        raise DataError(
            f"{', '.join(link.location for link in links)}: hold slices {held} of {first.slice_count}, expected each of "
            f"0 to {first.slice_count - 1} once; name all servers of the site in the URL"
        )
    return [link for _, link in sorted(zip(answers, links, strict=True), key=lambda pair: pair[0].slice_index)]
