"""A server from start to end: checks, listening, and a graceful end when it is asked to stop."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from everyscope.activations.serve.buffer import Buffer
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.counters import ServerCounters, SiteCounts
from everyscope.activations.serve.guard import read_certificates, read_token, require_safe
from everyscope.activations.serve.leases import ChunkKey, Leases
from everyscope.activations.serve.origin import Origin, ShardOrigin
from everyscope.activations.serve.ring import Ring
from everyscope.activations.serve.server import ActivationServer
from everyscope.activations.shards.format import CARRIER
from everyscope.activations.stream.order import Chunks
from everyscope.base.errors import ConfigError, first_line
from everyscope.base.files import human_bytes
from everyscope.base.logs import JsonLines
from everyscope.base.progress import say
from everyscope.base.signals import EXIT_CODE, termination

POLL_SECONDS = 0.2
MIN_SLOTS = 3
"""Fewer chunks in memory would serve one trainer at most."""


def run(config: ServeConfig) -> None:
    """Serve shards until SIGTERM, which ends with SystemExit once chunks under way are sent, or until KeyboardInterrupt.

    ConfigError for an unsafe or taken address, a bad token or certificate, or a buffer that is too small; DataError.
    """
    serve(config, ShardOrigin(config.shards, config.chunk_rows))


def serve(config: ServeConfig, origin: Origin) -> None:
    """`run` for any origin. Raises what `run` does."""
    with serving(config, origin) as server, termination() as is_asked_to_stop:
        while not is_asked_to_stop():
            time.sleep(POLL_SECONDS)
        say("shutting down: no new requests, sending chunks under way")
        server.drain()
    raise SystemExit(EXIT_CODE)


class Serving:
    """A running server."""

    def __init__(self, flight: ActivationServer, buffer: Buffer, location: str, log: Callable[..., None], drain: float) -> None:
        """Made by `serving`."""
        self._flight, self.buffer, self.location = flight, buffer, location
        self._log, self._drain_seconds = log, drain

    @property
    def port(self) -> int:
        """Where it listens; the one that was found where 0 was asked for."""
        return self._flight.port

    def drain(self) -> bool:
        """Take nothing new and wait for what is under way, for the config's drain_seconds at most; whether all of it ended."""
        self._log("drain")
        self.buffer.drain()
        end = threading.Thread(target=self._flight.shutdown, name="shutdown", daemon=True)  # it would wait for ever
        end.start()
        end.join(self._drain_seconds)
        self._log("stopped", is_whole=not end.is_alive())
        return not end.is_alive()


@contextmanager
def serving(config: ServeConfig, origin: Origin) -> Iterator[Serving]:
    """A server of any origin, listening within the block and drained at its end. Raises what `run` does."""
    token = read_token(config.token_file)
    require_safe(config, token)
    certificates = read_certificates(config)
    lines = None if config.log is None else JsonLines(config.log, config.log.stat().st_size if config.log.exists() else 0)
    lock = threading.Lock()

    def log(what: str, **details: Any) -> None:
        if what in ("refused", "error"):
            say(f"{what}: " + ", ".join(f"{name}={value}" for name, value in details.items() if value))
        if lines is not None:
            with lock:
                lines.write({"time": time.time(), "event": what} | details)

    buffer = Buffer(origin, ring_of(config, origin), config.read_threads, log)
    try:
        flight = ActivationServer(config, origin, buffer, token, certificates, log)
    except (pa.ArrowException, OSError) as error:
        buffer.close()
        raise ConfigError(
            f"--listen {config.listen}: cannot listen there ({first_line(error)}); is the port in use? is the certificate valid?"
        ) from error
    host = config.listen.rpartition(":")[0]
    place = f"flight{'+tls' if certificates else ''}://{host}:{flight.port}"
    log("listen", address=place, slice=config.slice, sites=list(origin.sites))
    server = Serving(flight, buffer, place, log, config.drain_seconds)
    say(f"serving {len(origin.sites)} sites (slice {config.slice}) at {place}/SITE, SITE one of {', '.join(origin.sites)}")
    try:
        yield server
    finally:
        if server.drain():
            buffer.close()
        if lines is not None:
            lines.close()


def ring_of(config: ServeConfig, origin: Origin) -> Ring:
    """The ring for an origin; ConfigError where the buffer cannot hold what it needs to begin."""
    slices, largest = {}, 0
    for name, facts in origin.sites.items():
        chunks = Chunks(facts.num_rows, config.chunk_rows, config.slice_count)
        slices[name] = chunks.slice(config.slice_index)
        largest = max(largest, min(config.chunk_rows, facts.num_rows) * facts.d_in * CARRIER[facts.dtype].itemsize)

    def num_bytes(key: ChunkKey) -> int:
        facts = origin.sites[key.site]
        start, stop = Chunks(facts.num_rows, config.chunk_rows).rows_of(key.chunk)
        return (stop - start) * facts.d_in * CARRIER[facts.dtype].itemsize

    first = next((ChunkKey(name, part.start) for name, part in slices.items() if part), None)
    if first is None:
        raise ConfigError(
            f"slice {config.slice}: there are not so many chunks of chunk_rows={config.chunk_rows}; take fewer slices"
        )
    slots, needed = config.buffer_bytes // largest, max(MIN_SLOTS, 1 + len(origin.group(first)))
    if slots < needed:
        raise ConfigError(
            f"buffer_bytes={config.buffer_bytes}: holds {slots} chunks of {human_bytes(largest)}, {needed} are the least; "
            f"set buffer_bytes={needed * largest} or more, or a smaller chunk_rows"
        )
    leases = Leases(config.lease_seconds, slices)
    counters = ServerCounters({name: SiteCounts() for name in origin.sites})
    return Ring(slots, leases, counters, num_bytes, origin.group, config.in_flight, config.hold_seconds)
