"""Talking to Neuronpedia's API over HTTP, with nothing but Python's own library.

The key comes from the environment, goes to the host that was given and to no other (redirects are not followed, and a key is not
sent in clear text to another machine), and is taken out of whatever comes back. Calls to this machine use no proxy.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from everyscope.base.errors import ConfigError, DataError, StorageError
from everyscope.base.http import is_loopback, opener_for
from everyscope.publish.neuronpedia.config import KEY_VARIABLE, NeuronpediaConfig

MAX_ANSWER = 1 << 22
"""Bytes of an answer that are read at most [bytes]."""
MAX_WAIT_S = 300.0
"""Longest wait before another attempt, whatever the host asks for [s]."""
PASSING = frozenset({0, 408, 425, 429, 500, 502, 503, 504})
"""Codes after which another attempt may do better; 0 is no answer at all."""
TOO_MANY = 429
"""The code of a host that takes no more for now: what was sent it has not read."""
REFUSED = frozenset({401, 403})
"""Codes of a key that is not taken."""
EXISTS = "already exists"
"""How the API says that a model or set is known."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    """The HTTP code; 0 where none came."""
    text: str
    retry_after: float | None = None
    """How long the host asks us to wait [s]."""

    @property
    def value(self) -> Any:
        """The JSON in it; None where there is none."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None


class Client:
    """One host and one key."""

    def __init__(self, config: NeuronpediaConfig, wait: Callable[[float], None] = time.sleep) -> None:
        """Sends nothing yet; ConfigError without a key, or where it would go out in clear text. `wait` sleeps [s]."""
        assert config.host is not None
        self._host, self._config, self._wait = config.host, config, wait
        self._key = os.environ.get(KEY_VARIABLE, "")
        parts = urlsplit(config.host)
        host = parts.hostname or ""
        if not self._key:
            raise ConfigError(f"{KEY_VARIABLE}: is not set; export your key of {config.host} under this name, or give --dry-run")
        if parts.scheme == "http" and not is_loopback(host):
            raise ConfigError(f"{config.host}: would send the key in clear text; use https")
        self._opener = opener_for(host)

    def post(self, route: str, body: bytes, is_there: Callable[[], bool] | None = None) -> Answer:
        """Send `body` until it is taken.

        A body whose answer was lost may have been taken: `is_there` tells, and is asked before it is sent a second time. Raises
        ConfigError for a key that is refused, DataError for a body that is, StorageError where no attempt is left.
        """
        answer = self._tried(route, body, is_there)
        if answer.status != 200:
            raise self._complaint(route, answer)
        return answer

    def has_feature(self, model: str, source: str, index: int) -> bool:
        """Whether the host knows a latent; errors are as for `post`."""
        route = "feature/" + "/".join(quote(part, safe="") for part in (model, source, str(index)))
        answer = self._tried(route, None)
        if answer.status not in (200, 404):
            raise self._complaint(route, answer)
        return isinstance(answer.value, dict) and str(answer.value.get("index")) == str(index)

    def _tried(self, route: str, body: bytes | None, is_there: Callable[[], bool] | None = None) -> Answer:
        """The first answer that another attempt would not better, or the last one."""
        answer = self._ask(route, body)
        for attempt in range(self._config.retries):
            if answer.status not in PASSING:
                break
            wait = self._config.backoff_s * 2**attempt if answer.retry_after is None else answer.retry_after
            self._wait(min(wait, MAX_WAIT_S))
            if answer.status != TOO_MANY and is_there is not None and is_there():
                return Answer(200, "{}")
            answer = self._ask(route, body)
        return answer

    def _ask(self, route: str, body: bytes | None) -> Answer:
        request = urllib.request.Request(f"{self._host}/api/{route}", body, method="GET" if body is None else "POST")
        request.add_header("X-Api-Key", self._key)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=self._config.timeout_s) as response:
                return Answer(response.status, self._hidden(response.read(MAX_ANSWER)))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, self._hidden(error.read(MAX_ANSWER)), _seconds(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return Answer(0, self._hidden(str(reason or type(reason).__name__).encode()))

    def _complaint(self, route: str, answer: Answer) -> ConfigError | DataError | StorageError:
        reason = answer.value.get("error") if isinstance(answer.value, dict) else None
        words = " ".join(str(reason or answer.text).split())[:300] or "no answer"
        where = f"{self._host}/api/{route}"
        if answer.status in REFUSED:
            return ConfigError(
                f"{where}: refuses the key (HTTP {answer.status}: {words}); set {KEY_VARIABLE} to one that may write"
            )
        if answer.status in PASSING:
            again = "run the same command to resume"
            code = f"HTTP {answer.status}: " if answer.status else ""
            return StorageError(f"{where}: not reached in {1 + self._config.retries} attempts ({code}{words}); {again}")
        return DataError(
            f"{where}: refuses what we send (HTTP {answer.status}: {words}); correct that and run the same command to resume"
        )

    def _hidden(self, text: bytes) -> str:
        """`text` without the key, should a host repeat it."""
        return text.decode("utf-8", "replace").replace(self._key, "…")


def _seconds(header: str | None) -> float | None:
    """A Retry-After header that gives seconds [s]; dates are not read."""
    try:
        return max(float(header), 0.0) if header is not None else None
    except ValueError:
        return None
