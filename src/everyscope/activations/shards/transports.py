"""Ranges of bytes from elsewhere: http(s) by httpx2, everything else by fsspec; and the patience to ask again.

A transport makes one attempt. It raises FileNotFoundError and PermissionError, which waiting does not cure, and OSError for
whatever may go better the next time. Our own errors pass through: they say what is wrong with the server for good.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import httpx2

from everyscope.base.errors import ConfigError, DamagedData, DataError, MissingExtra, StorageError, first_line
from everyscope.base.extras import import_extra

RECORD_BYTES = 1 << 28
"""A record (manifest, sidecar, statistics) is never larger [bytes]."""
NO_CONNECTION_KEPT = httpx2.Limits(max_keepalive_connections=0)
"""Processes that are forked while a folder is open must not share its connections."""


@dataclass(frozen=True)
class Patience:
    """How long and how often one read is tried."""

    deadline: float = 120.0
    """From the first attempt to giving up [s]."""
    attempt: float = 30.0
    """For one attempt [s]."""
    pause: float = 0.25
    """Between the first two attempts; doubled each time, with a fifth of chance so that readers spread [s]."""
    longest_pause: float = 10.0
    """Between two attempts at most [s]."""
    sleep: Callable[[float], None] = time.sleep
    """Waits [s]."""
    clock: Callable[[], float] = time.monotonic
    """A time that only goes forward [s]."""


class Transport(Protocol):
    """One place from which files are read by range."""

    def read(self, file: str, start: int, stop: int | None, seconds: float) -> bytes:
        """Bytes `start` to `stop` (excluded) of `file`, or all of a small one where `stop` is None; once, within `seconds`."""
        ...


class HttpTransport:
    """A web server that serves ranges: a plain GET for each."""

    def __init__(self, address: str) -> None:
        """`address` of the folder, http:// or https://."""
        self._address = address.rstrip("/")
        headers = {"User-Agent": "everyscope", "Accept-Encoding": "identity"}
        self._client = httpx2.Client(headers=headers, follow_redirects=True, limits=NO_CONNECTION_KEPT)

    def read(self, file: str, start: int, stop: int | None, seconds: float) -> bytes:
        """One GET; StorageError where the server sends whole files only, DamagedData where the file is too short."""
        address = f"{self._address}/{quote(file)}"
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        until = time.monotonic() + seconds
        try:
            with self._client.stream("GET", address, headers=headers, timeout=seconds) as response:
                code = response.status_code
                if code in (404, 410):
                    raise FileNotFoundError(address)
                if code in (401, 403):
                    raise PermissionError(f"HTTP {code}")
                if code == 416:
                    raise DamagedData(f"{address}: ends before byte {stop}; copy it again from its source")
                if not response.is_success:
                    raise OSError(f"HTTP {code}")
                wanted = RECORD_BYTES if stop is None else _range_size(address, response, start, stop)
                return _received(address, response, wanted, until, is_whole=stop is None)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise OSError(f"broken answer: {first_line(error)}") from error


class FsspecTransport:
    """Any file system that fsspec knows: s3://, gs://, az://, memory://, ..."""

    def __init__(self, address: str) -> None:
        """MissingExtra where the protocol's package is not installed, ConfigError where nobody knows the protocol."""
        fsspec = import_extra("fsspec", "cloud", f"reading {address}")
        try:
            self._files, self._path = fsspec.core.url_to_fs(address)
        except ImportError as error:
            raise MissingExtra(error.name or first_line(error), "cloud", f"reading {address}") from error
        except ValueError as error:
            raise ConfigError(f"{address}: {first_line(error)}; give a path, or an address such as s3://bucket/folder") from error

    def read(self, file: str, start: int, stop: int | None, seconds: float) -> bytes:
        """One `cat_file`, given up on after `seconds`."""
        path = f"{self._path.rstrip('/')}/{file}"
        data = _within(seconds, lambda: self._files.cat_file(path, start=start, end=RECORD_BYTES if stop is None else stop))
        if stop is not None and len(data) != stop - start:
            raise OSError(f"truncated: {len(data)} of {stop - start} bytes")
        return data


def transport_of(address: str) -> Transport:
    """What reads from `address`."""
    return HttpTransport(address) if address.startswith(("http://", "https://")) else FsspecTransport(address)


def patiently(name: str, attempt: Callable[[float], bytes], patience: Patience) -> bytes:
    """What `attempt` gives, given its seconds; again and again until the deadline.

    DataError where there is no such file; StorageError where reading is not allowed, or where the deadline has passed.
    """
    chance, started, pause = random.Random(f"{os.getpid()} {name}"), patience.clock(), patience.pause
    while True:
        left = patience.deadline - (patience.clock() - started)
        try:
            return attempt(min(patience.attempt, max(left, 0.001)))
        except FileNotFoundError as error:
            raise DataError(f"{name}: no such file; is this the right address, and did the harvest finish?") from error
        except PermissionError as error:
            raise StorageError(f"{name}: reading is not allowed ({first_line(error)}); check your credentials") from error
        except OSError as error:
            left = patience.deadline - (patience.clock() - started)
            if left <= pause:
                raise StorageError(
                    f"{name}: no complete answer within {patience.deadline:g} s, the last error was {first_line(error)!r}; "
                    "check the network and the server, then run the same command again"
                ) from error
        patience.sleep(min(left, pause * chance.uniform(0.8, 1.2)))
        pause = min(2 * pause, patience.longest_pause)


def _range_size(address: str, response: httpx2.Response, start: int, stop: int) -> int:
    """Bytes to expect of an answer to a request for a range."""
    header = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not header.startswith(f"bytes {start}-{stop - 1}/"):
        raise DamagedData(f"{address}: sent {header or 'no Content-Range'} for bytes {start}-{stop - 1}; copy it again")
    is_all = start == 0 and response.headers.get("Content-Length") == str(stop)
    if response.status_code != 206 and not is_all:
        raise StorageError(
            f"{address}: the server does not support byte ranges (HTTP {response.status_code}); use another, or copy the folder"
        )
    return stop - start


def _received(address: str, response: httpx2.Response, wanted: int, until: float, *, is_whole: bool) -> bytes:
    data = bytearray()
    for piece in response.iter_raw():
        data += piece
        if time.monotonic() > until:
            raise TimeoutError(f"{len(data)} bytes within the time limit")
        if len(data) >= wanted:
            break
    if is_whole:
        header = response.headers.get("Content-Length")
        if len(data) >= RECORD_BYTES:
            raise DataError(f"{address}: larger than any everyscope record; is this a folder of shards?")
        wanted = len(data) if header is None else int(header)
    if len(data) < wanted:
        raise OSError(f"truncated: {len(data)} of {wanted} bytes")
    return bytes(data[:wanted])


def _within(seconds: float, function: Callable[[], bytes]) -> bytes:
    """What `function` gives, or TimeoutError. File systems of fsspec take no deadline; a daemon that hangs holds up no exit."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(function())
        except Exception as error:  # every file system has errors of its own
            outcome.append(error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {first_line(error)}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.3g} s")
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]
