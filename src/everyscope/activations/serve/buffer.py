"""The ring in operation: threads, clocks and memory around its rules.

Requests wait here for their chunks. One thread drives the ring; others read. A chunk that is on its way to a trainer is held by
the `InFlightChunk` that Arrow keeps alive until the last byte is handed to the network, or the call ends: when it dies the ring
hears of it. That is how a trainer that stalls, or is killed, is accounted for without asking it.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from everyscope.activations.serve.leases import ChunkKey, Lease, Refused
from everyscope.activations.serve.origin import Origin
from everyscope.activations.serve.ring import Ring
from everyscope.activations.stream.wire import Refusal, checksum
from everyscope.base.errors import EveryscopeError, first_line

POLL_SECONDS = 0.25
"""How often a waiting request looks whether its client is still there, and the ring whether a lease has lapsed [s]."""


class InFlightChunk:
    """A chunk on its way; while it lives, so do its rows."""

    __slots__ = ("__weakref__", "key", "rows", "xxh3")

    def __init__(self, key: ChunkKey, rows: np.ndarray, xxh3: str) -> None:
        """Made by `Buffer.take`."""
        self.key, self.rows, self.xxh3 = key, rows, xxh3


class Buffer:
    """Chunks of an origin in bounded memory, for many waiting requests."""

    def __init__(self, origin: Origin, ring: Ring, read_threads: int, on_event: Callable[..., None]) -> None:
        """`on_event(what, **details)` receives leases and errors, for the log; `ring` is the buffer's alone from now on."""
        self._origin, self._ring, self._on_event = origin, ring, on_event
        self._rows: dict[ChunkKey, tuple[np.ndarray, str]] = {}
        self._granted: dict[int, ChunkKey] = {}
        self._errors: dict[int, str] = {}
        self._changed = threading.Condition()
        self._is_draining = False
        self._readers = ThreadPoolExecutor(read_threads, "read")
        # The dead parcels' numbers: put by finalizers, which may run anywhere and so must not take locks.
        self._sent: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._driver = threading.Thread(target=self._drive, name="ring", daemon=True)
        self._driver.start()

    def lease(self, trainer: str, site: str, is_any: bool, epoch: int, seen: np.ndarray | None, id: str) -> Lease:
        """Let a trainer in; Refused where that is not possible."""
        with self._changed:
            self._refuse_if_draining()
            lease, before = self._ring.lease(id, trainer, site, is_any, epoch, seen, now=time.monotonic())
            self._changed.notify_all()
        self._on_event("lease", trainer=trainer, site=site, order="any" if is_any else "fixed", replaces=before is not None)
        return lease

    def renew(self, lease_id: str) -> None:
        """Keep a lease; Refused where it is gone."""
        with self._changed:
            self._refuse_if_draining()
            self._ring.leases.find(lease_id, time.monotonic())

    def release(self, lease_id: str) -> None:
        """End a lease; Refused where it is gone."""
        with self._changed:
            lease = self._ring.release(lease_id, time.monotonic())
            self._changed.notify_all()
        self._on_event("release", trainer=lease.trainer, site=lease.site)

    def take(
        self, lease_id: str, chunk: int | None, epoch: int, request: int, wait_seconds: float, is_cancelled: Callable[[], bool]
    ) -> InFlightChunk:
        """Wait for a chunk; Refused (WAIT) after `wait_seconds` or when the client is gone, (DATA) where it cannot be read."""
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            self._refuse_if_draining()
            wait = self._ring.request(lease_id, chunk, epoch, request, now=time.monotonic())
            self._step()
            while wait not in self._granted:
                if wait in self._errors:
                    raise Refused(Refusal.DATA, self._errors.pop(wait))
                if not self._ring.is_waiting(wait):
                    raise Refused(Refusal.LEASE, "the lease ended while this request waited")
                left = deadline - time.monotonic()
                if left <= 0 or self._is_draining or is_cancelled():
                    self._ring.withdraw(wait)
                    self._refuse_if_draining()
                    raise Refused(Refusal.WAIT, "the chunk is not ready; ask again")
                self._changed.wait(min(left, POLL_SECONDS))
            key = self._granted.pop(wait)
            in_flight = InFlightChunk(key, *self._rows[key])
        weakref.finalize(in_flight, self._sent.put, wait).atexit = False
        return in_flight

    def report(self) -> dict[str, Any]:
        """Counts and the buffer's state."""
        with self._changed:
            bytes_held = sum(rows.nbytes for rows, _ in self._rows.values())
            return self._ring.counters.as_json() | {"buffer": self._ring.report() | {"bytes": bytes_held}}

    def refused(self, reason: str) -> None:
        """Count a request that was turned down."""
        with self._changed:
            self._ring.counters.refused(reason)

    def drain(self) -> None:
        """Refuse new requests; those under way continue."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads, after the server has ended."""
        self.drain()
        self._sent.put(None)
        self._driver.join()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._origin.close()

    def _refuse_if_draining(self) -> None:
        if self._is_draining:
            raise Refused(Refusal.DRAINING, "the server is shutting down and accepts no new requests")

    def _drive(self) -> None:
        while True:
            sent: list[int] = []
            with suppress(queue.Empty):
                item = self._sent.get(timeout=POLL_SECONDS)
                if item is None:
                    return
                sent.append(item)
                while True:  # all waiting requests: one step serves them together
                    item = self._sent.get_nowait()
                    if item is None:
                        return
                    sent.append(item)
            with self._changed:
                for wait in sent:
                    self._ring.sent(wait)
                self._step()

    def _step(self) -> None:
        """Let the ring decide and do it; the lock is held."""
        decision = self._ring.step(time.monotonic())
        for key in decision.drops:
            del self._rows[key]
        for grant in decision.grants:
            self._granted[grant.wait] = grant.key
        for key in decision.loads:
            self._readers.submit(self._load, key)
        if decision.grants:
            self._changed.notify_all()
        for lease in decision.lapsed:
            self._on_event("lapse", trainer=lease.trainer, site=lease.site)

    def _load(self, key: ChunkKey) -> None:
        try:
            arrays = {member: (rows, checksum(rows)) for member, rows in self._origin.read(key).items()}
        except Exception as error:  # whatever it is, the readers that wait must get it, and the server must keep running
            message = str(error) if isinstance(error, EveryscopeError) else f"{type(error).__name__}: {first_line(error)}"
            with self._changed:
                for wait in self._ring.failed(key):
                    self._errors[wait] = message
                self._step()
                self._changed.notify_all()
            self._on_event("error", site=key.site, chunk=key.chunk, message=message)
            return
        with self._changed:
            for member in self._ring.loaded(key, time.monotonic()):
                self._rows[member] = arrays[member]
            self._step()
