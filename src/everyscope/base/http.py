"""One client of HTTP for all that asks a host: with a key that no other host sees, within a time, by httpx2."""

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from everyscope.base.addresses import is_loopback
from everyscope.base.errors import ConfigError, first_line

MAX_ANSWER = 1 << 22
"""Bytes of an answer that are read at most [bytes]."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    """The HTTP code; 0 where no whole answer came."""
    text: str
    """The body, or what went wrong; the key in it is replaced."""
    error: str = ""
    """The kind of what went wrong, where no whole answer came."""
    retry_after: float | None = None
    """How long the host asks us to wait [s]."""

    @property
    def outcome(self) -> str:
        """The code or, where none came, the kind of error."""
        return self.error or f"HTTP {self.status}"

    def pause(self, attempt: int, first: float, longest: float) -> float:
        """How long to wait before attempt 1, 2, ...: what the host asks for, else `first`, doubled each time [s]."""
        return min(first * 2 ** (attempt - 1) if self.retry_after is None else self.retry_after, longest)


class Host:
    """One host and one key.

    The key goes to this host alone: redirects are not followed, it is not sent in clear text to another machine, and it is taken
    out of whatever comes back. This machine is asked without the proxies of the environment.
    """

    def __init__(self, address: str, key: str, header: str, prefix: str, timeout_s: float) -> None:
        """Sends nothing yet; ConfigError where `key` would go out in clear text. It is sent as `header`, behind `prefix`."""
        parts = urlsplit(address)
        is_here = is_loopback(parts.hostname or "")
        if key and parts.scheme == "http" and not is_here:
            raise ConfigError(f"{address}: would send the key in clear text; use https, or unset the key's environment variable")
        self._address, self._key, self._timeout_s = address, key, timeout_s
        headers = {header: prefix + key} if key else {}
        unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.Client(headers=headers, timeout=timeout_s, trust_env=not is_here, limits=unlimited)

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        """GET, or POST a JSON body; what came within `timeout_s`. Raises nothing where the host cannot be reached."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        end, data = time.monotonic() + self._timeout_s, bytearray()
        try:
            method = "GET" if body is None else "POST"
            with self._client.stream(method, f"{self._address}/{path}", content=body, headers=headers) as response:
                for piece in response.iter_bytes():
                    data += piece
                    if time.monotonic() > end:
                        return Answer(0, f"no complete answer within {self._timeout_s:g} s", "TimeoutError")
                    if len(data) > MAX_ANSWER:
                        return Answer(0, f"the answer is longer than {MAX_ANSWER} bytes", "TooLong")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Answer(0, self._hidden(first_line(error)), type(error).__name__)
        text = self._hidden(bytes(data).decode("utf-8", "replace"))
        return Answer(response.status_code, text, retry_after=_seconds(response.headers.get("Retry-After")))

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def _seconds(header: Any) -> float | None:
    """A Retry-After header that gives seconds [s]; dates are not read."""
    try:
        return max(float(header), 0.0) if header is not None else None
    except ValueError:
        return None
