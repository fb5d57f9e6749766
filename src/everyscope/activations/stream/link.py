"""One connection to one activation server: calls that end, errors that say what to do, and chunks checked on arrival."""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import pyarrow as pa
import pyarrow.flight as flight
import xxhash

from everyscope.activations.stream.rows import ChunkRows, rows_in
from everyscope.activations.stream.wire import (
    HEAD,
    MAX_TICKET_BYTES,
    PROTOCOL,
    BadRequest,
    ChunkHead,
    Describe,
    Described,
    Leased,
    LeaseRequest,
    Places,
    PlacesRequest,
    Refusal,
    Renew,
    Ticket,
    batch_memory,
    encode,
    parse,
)
from everyscope.base.errors import ConfigError, DamagedData, DataError, first_line
from everyscope.base.schema import Schema

CHANNEL = [
    ("grpc.enable_http_proxy", 0),  # activations do not go through whatever HTTP_PROXY says
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),  # gRPC's own 120 s would make a short outage long
    ("grpc.min_reconnect_backoff_ms", 10_000),  # which is how long one attempt to connect may take, handshakes included
]
"""How gRPC connects."""
Answer = TypeVar("Answer", bound=Schema)
Result = TypeVar("Result")


class Unreachable(Exception):
    """The server did not answer, has no room for another trainer, or is about to end; it may be back later."""


class NotYet(Exception):
    """The server is well but has no chunk yet: ask again."""


class LeaseLost(Exception):
    """The server knows nothing of the lease, or holds another account of it: take a new one."""


class Link:
    """A connection to `location`. Threads may share it."""

    def __init__(self, location: str, token: str | None, roots: bytes | None, call_seconds: float) -> None:
        """Connects at the first call. `roots` are PEM certificates to trust for TLS; a call ends after `call_seconds` [s]."""
        self.location = location
        self._client = flight.FlightClient(location, tls_root_certs=roots, generic_options=CHANNEL)
        headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        self._options = flight.FlightCallOptions(timeout=call_seconds, headers=headers)
        self._goodbye = flight.FlightCallOptions(timeout=min(call_seconds, 2.0), headers=headers)
        self._lock = threading.Lock()
        self._lease: Leased | None = None
        self._is_closed = False

    def describe(self, site: str, boot_id: str | None) -> Described:
        """What the server knows of `site`."""
        return self._ask("describe", Describe(protocol=PROTOCOL, site=site, boot_id=boot_id), Described)

    def places(self, site: str) -> str:
        """A content id of which token each row of `site` is of."""
        return self._ask("places", PlacesRequest(site=site), Places).places

    def lease(self, request: Callable[[], LeaseRequest], check: Callable[[Leased], None]) -> Leased:
        """The lease that is held, or a new one; one thread takes it for all. `check` looks at a new one and may raise."""
        with self._lock:
            if self._lease is None:
                taken = self._ask("lease", request(), Leased)
                check(taken)
                self._lease = taken
            return self._lease

    def forget(self, lease: Leased) -> None:
        """The server knows it no more."""
        with self._lock:
            if self._lease is lease:
                self._lease = None

    def renew(self) -> None:
        """Tell the server that we are still here, where a lease is held."""
        lease = self._lease
        if lease is not None:
            try:
                self._call(lambda: list(self._client.do_action(_action("renew", Renew(lease=lease.lease)), self._options)))
            except LeaseLost:
                self.forget(lease)

    def chunk(self, ticket: Ticket) -> tuple[ChunkHead, ChunkRows]:
        """One chunk, in the stored number format; DamagedData where it arrived changed."""
        return self._call(lambda: self._receive(ticket))

    def counters(self) -> bytes:
        """The server's counters, as JSON."""
        return self._call(lambda: _only(self._client.do_action(flight.Action("counters", b"{}"), self._options)))

    def close(self) -> None:
        """Give the lease back, if the server can hear it, and hang up."""
        self._is_closed = True
        lease = self._lease
        if lease is not None:
            with suppress(pa.ArrowException):  # then it will lapse
                list(self._client.do_action(_action("release", Renew(lease=lease.lease)), self._goodbye))
        self._client.close()

    def _ask(self, action: str, request: Schema, kind: type[Answer]) -> Answer:
        body = self._call(lambda: _only(self._client.do_action(_action(action, request), self._options)))
        try:
            return parse(kind, body, 1 << 20)
        except BadRequest as error:
            raise ConfigError(
                f"{self.location}: unexpected form of answer ({error}); run the same everyscope on both sides"
            ) from error

    def _receive(self, ticket: Ticket) -> tuple[ChunkHead, ChunkRows]:
        body = encode(ticket)
        assert len(body) <= MAX_TICKET_BYTES, body
        reader = self._client.do_get(flight.Ticket(body), self._options)
        try:
            head = parse(ChunkHead, (reader.schema.metadata or {}).get(HEAD, b""), 4096)
            parts, digest, left = [], xxhash.xxh3_64(), head.rows
            for message in reader:
                buffer, offset, count = batch_memory(message.data, head)
                left -= count
                if left < 0:
                    raise BadRequest("more rows than said")
                digest.update(memoryview(buffer)[offset : offset + count * head.row_bytes])
                parts.append(rows_in(buffer, offset, count, head.d_in, head.dtype))
            if left:
                raise BadRequest("fewer rows than said")
        except BadRequest as error:
            raise DamagedData(f"{self.location}: sent no everyscope chunk ({error}); is it an everyscope server?") from error
        if digest.hexdigest() != head.xxh3:
            raise DamagedData(f"{self.location}: chunk {head.chunk} of {head.site} was corrupted in transit; check the network")
        return head, ChunkRows(parts)

    def _call(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
            raise ConfigError(
                f"{self.location}: the token was refused; set EVERYSCOPE_TOKEN to the server's, or give its file"
            ) from error
        except flight.FlightUnavailableError as error:
            if _code(error) == Refusal.WAIT.value:
                raise NotYet(_message_of(error)) from error
            raise Unreachable(_message_of(error)) from error
        except flight.FlightServerError as error:
            raise self._refused(error) from error
        except (flight.FlightError, OSError) as error:
            raise Unreachable(_message_of(error)) from error  # a cut connection shows as one of many
        except pa.ArrowException as error:
            if self._is_closed:
                raise Unreachable("the source was closed") from error
            raise DamagedData(
                f"{self.location}: sent no everyscope chunk ({_message_of(error)}); is it an everyscope server?"
            ) from error

    def _refused(self, error: flight.FlightServerError) -> Exception:
        code, message = _code(error), _message_of(error)
        if code in (Refusal.LEASE.value, Refusal.EXHAUSTED.value):
            return LeaseLost(message)
        if code == Refusal.REPLACED.value:
            return ConfigError(f"{self.location}: {message}")
        if code == Refusal.DATA.value:
            return DamagedData(f"{self.location}: {message}")
        if code == Refusal.REQUEST.value:
            return DataError(f"{self.location}: {message}")
        return Unreachable(message)


def _action(name: str, request: Schema) -> flight.Action:
    return flight.Action(name, encode(request))


def _only(results: Iterable[flight.Result]) -> bytes:
    bodies = [result.body.to_pybytes() for result in results]
    return bodies[0] if bodies else b""


def _code(error: flight.FlightError) -> str:
    return (getattr(error, "extra_info", None) or b"").decode("ascii", "replace")


def _message_of(error: BaseException) -> str:
    """What an error says, without what gRPC and Arrow put before and behind it."""
    text = first_line(error).partition("with message: ")
    return (text[2] or text[0]).partition(". Detail:")[0].partition(". gRPC client debug context:")[0]
