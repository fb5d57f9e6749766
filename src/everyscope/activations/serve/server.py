"""The Flight server: a thin skin that parses strictly, asks the buffer, and hands chunks to Arrow, which sends them from C++."""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import pyarrow.flight as flight

from everyscope.activations.serve.buffer import Buffer
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.counters import prometheus
from everyscope.activations.serve.guard import RefusalLog, TokenGate
from everyscope.activations.serve.leases import Refused
from everyscope.activations.serve.origin import Origin
from everyscope.activations.stream.background import in_background
from everyscope.activations.stream.order import Chunks
from everyscope.activations.stream.sliced import boot_id
from everyscope.activations.stream.wire import (
    MAX_ACTION_BYTES,
    MAX_TICKET_BYTES,
    PROTOCOL,
    BadRequest,
    ChunkHead,
    Describe,
    Described,
    Leased,
    LeaseRequest,
    Nothing,
    Places,
    PlacesRequest,
    Refusal,
    Renew,
    Ticket,
    chunk_table,
    encode,
    parse,
    unpack_seen,
)
from everyscope.base.errors import EveryscopeError

RETRY = frozenset({Refusal.WAIT, Refusal.BUSY, Refusal.DRAINING})
"""Refusals that say nothing against the request; they travel as 'unavailable'."""


class ActivationServer(flight.FlightServerBase):
    """Serves one slice of each site of an origin."""

    def __init__(
        self,
        config: ServeConfig,
        origin: Origin,
        buffer: Buffer,
        token: str | None,
        certificates: list[tuple[bytes, bytes]],
        log: Callable[..., None],
    ) -> None:
        """Listen at `config.address`; FlightError where it is taken. `log(what, **details)` writes a line."""
        host, port = config.address
        self._config, self._origin, self._buffer = config, origin, buffer
        self._refusals = RefusalLog(log)
        self._host_id = boot_id() if config.offer_files else None
        self._started = time.monotonic()
        self._places_lock = threading.Lock()
        self._places_of: dict[str, Future[str]] = {}
        self._actions = {
            "describe": self._describe,
            "lease": self._lease,
            "renew": self._renew,
            "release": self._release,
            "places": self._places,
            "counters": self._counters,
            "metrics": self._metrics,
        }
        gate = {"token": TokenGate(token, lambda reason, message: self._refuse(reason, "", message))} if token else {}
        place = f"[{host}]" if ":" in host else host
        scheme = "grpc+tls" if certificates else "grpc"
        super().__init__(f"{scheme}://{place}:{port}", tls_certificates=certificates or None, middleware=gate)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        """One chunk."""
        with self._answering(context):
            wanted = parse(Ticket, ticket.ticket, MAX_TICKET_BYTES)
            in_flight = self._buffer.take(
                wanted.lease, wanted.chunk, wanted.epoch, wanted.request, self._config.wait_seconds, context.is_cancelled
            )
            facts = self._origin.sites[in_flight.key.site]
            head = ChunkHead(
                identity=facts.identity,
                site=in_flight.key.site,
                chunk=in_flight.key.chunk,
                rows=len(in_flight.rows),
                d_in=facts.d_in,
                dtype=facts.dtype,
                xxh3=in_flight.xxh3,
            )
            return flight.RecordBatchStream(chunk_table(head, in_flight.rows.ctypes.data, in_flight))

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[flight.Result]:
        """One small question."""
        with self._answering(context):
            if action.type not in self._actions:
                raise BadRequest(f"no such action; there are {', '.join(self._actions)}")
            body = b"" if action.body is None else memoryview(action.body)
            return iter([flight.Result(self._actions[action.type](body))])

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        """The actions' names."""
        return [(name, "everyscope.activations.stream.wire") for name in self._actions]

    def _describe(self, body: bytes | memoryview) -> bytes:
        asked = parse(Describe, body, MAX_ACTION_BYTES)
        if asked.protocol != PROTOCOL:
            raise BadRequest(
                f"protocol {asked.protocol}; this server speaks {PROTOCOL}: install the same everyscope on both sides"
            )
        facts = self._origin.sites.get(asked.site)
        if facts is None:
            raise BadRequest(f"no such site here; there are {', '.join(self._origin.sites)}")
        is_here = self._host_id is not None and asked.boot_id == self._host_id
        config = self._config
        answer = Described(
            protocol=PROTOCOL,
            site=asked.site,
            identity=facts.identity,
            num_rows=facts.num_rows,
            d_in=facts.d_in,
            dtype=facts.dtype,
            statistics=facts.statistics.record(),
            chunk_rows=config.chunk_rows,
            slice_index=config.slice_index,
            slice_count=config.slice_count,
            lease_seconds=config.lease_seconds,
            in_flight=config.in_flight,
            folder=str(facts.folder) if is_here and facts.folder is not None else None,
        )
        return encode(answer)

    def _lease(self, body: bytes | memoryview) -> bytes:
        asked = parse(LeaseRequest, body, MAX_ACTION_BYTES)
        facts, config = self._origin.sites.get(asked.site), self._config
        if facts is None:
            raise BadRequest(f"no such site here; there are {', '.join(self._origin.sites)}")
        chunks = Chunks(facts.num_rows, config.chunk_rows, config.slice_count)
        part, is_any = chunks.slice(config.slice_index), asked.order == "any"
        seen = unpack_seen(asked.seen, len(part)) if is_any else None
        lease = self._buffer.lease(asked.trainer, asked.site, is_any, asked.epoch, seen, secrets.token_hex(16))
        answer = Leased(
            lease=lease.id,
            identity=facts.identity,
            slice_index=config.slice_index,
            slice_count=config.slice_count,
            chunk_rows=config.chunk_rows,
        )
        return encode(answer)

    def _places(self, body: bytes | memoryview) -> bytes:
        asked = parse(PlacesRequest, body, MAX_TICKET_BYTES)
        if asked.site not in self._origin.sites:
            raise BadRequest(f"no such site here; there are {', '.join(self._origin.sites)}")
        with self._places_lock:  # computed once, and no more than one for each site
            if asked.site not in self._places_of:
                self._places_of[asked.site] = in_background(self._origin.places, asked.site)
            found = self._places_of[asked.site]
        wait([found], self._config.wait_seconds)
        if not found.done():
            raise Refused(Refusal.WAIT, "the rows' places are still being read; ask again")
        if found.exception() is not None:
            with self._places_lock:  # whoever asks next has them read again: a disk may have been away
                if self._places_of.get(asked.site) is found:
                    del self._places_of[asked.site]
        try:
            return encode(Places(places=found.result()))
        except EveryscopeError as error:
            raise Refused(Refusal.DATA, str(error)) from error

    def _renew(self, body: bytes | memoryview) -> bytes:
        self._buffer.renew(parse(Renew, body, MAX_TICKET_BYTES).lease)
        return encode(Nothing())

    def _release(self, body: bytes | memoryview) -> bytes:
        self._buffer.release(parse(Renew, body, MAX_TICKET_BYTES).lease)
        return encode(Nothing())

    def _report(self) -> dict[str, object]:
        own = {"slice": self._config.slice, "uptime_seconds": time.monotonic() - self._started}
        return self._buffer.report() | own

    def _counters(self, body: bytes | memoryview) -> bytes:
        parse(Nothing, body or b"{}", MAX_TICKET_BYTES)
        return json.dumps(self._report()).encode()

    def _metrics(self, body: bytes | memoryview) -> bytes:
        parse(Nothing, body or b"{}", MAX_TICKET_BYTES)
        return prometheus(self._report()).encode()

    @contextmanager
    def _answering(self, context: flight.ServerCallContext) -> Iterator[None]:
        """Turn what is refused inside into an error that the client understands, and count and log it."""
        try:
            yield
        except BadRequest as error:
            self._refuse(Refusal.REQUEST.value, context.peer(), str(error))
            raise flight.FlightServerError(str(error), Refusal.REQUEST.value.encode()) from None
        except Refused as refused:
            code, message = refused.refusal.value, str(refused)
            if refused.refusal in RETRY:
                raise flight.FlightUnavailableError(message, code.encode()) from None
            self._refuse(code, context.peer(), message)
            raise flight.FlightServerError(message, code.encode()) from None

    def _refuse(self, reason: str, peer: str, message: str) -> None:
        self._buffer.refused(reason)
        self._refusals.note(reason, peer, message)
