"""Neuronpedia's upload API."""

import json
import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from everyscope.base.errors import ConfigError, DataError, StorageError
from everyscope.base.http import Answer, Host
from everyscope.publish.neuronpedia.config import KEY_VARIABLE, NeuronpediaConfig

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


class Client:
    """One host and one key."""

    def __init__(self, config: NeuronpediaConfig, wait: Callable[[float], None] = time.sleep) -> None:
        """Sends nothing yet; ConfigError without a key, or where it would go out in clear text. `wait` sleeps [s]."""
        assert config.host is not None
        self._address, self._config, self._wait = f"{config.host}/api", config, wait
        if not (key := os.environ.get(KEY_VARIABLE, "")):
            raise ConfigError(f"{KEY_VARIABLE}: is not set; export your key of {config.host} under this name, or give --dry-run")
        self._host = Host(self._address, key, "X-Api-Key", "", config.timeout_s)

    def post(self, route: str, body: bytes, is_there: Callable[[], bool] | None = None) -> None:
        """Send `body` until the host takes it.

        A body whose answer was lost may have been taken: `is_there` asks for it before it is sent a second time. Raises
        ConfigError for a key that is refused, DataError for a body that is, StorageError where no attempt is left.
        """
        answer = self._tried(route, body, is_there)
        if answer.status != 200:
            raise self._complaint(route, answer)

    def has_feature(self, model: str, source: str, index: int) -> bool:
        """Whether the host knows a latent; errors are as for `post`."""
        route = "feature/" + "/".join(quote(part, safe="") for part in (model, source, str(index)))
        answer = self._tried(route, None)
        if answer.status not in (200, 404):
            raise self._complaint(route, answer)
        value = _json(answer)
        return isinstance(value, dict) and str(value.get("index")) == str(index)

    def _tried(self, route: str, body: bytes | None, is_there: Callable[[], bool] | None = None) -> Answer:
        """The first answer that another attempt would not better, or the last one."""
        answer = self._host.ask(route, body)
        for attempt in range(1, self._config.retries + 1):
            if answer.status not in PASSING:
                break
            self._wait(answer.pause(attempt, self._config.backoff_s, MAX_WAIT_S))
            if answer.status != TOO_MANY and is_there is not None and is_there():
                return Answer(200, "")
            answer = self._host.ask(route, body)
        return answer

    def _complaint(self, route: str, answer: Answer) -> ConfigError | DataError | StorageError:
        value = _json(answer)
        reason = value.get("error") if isinstance(value, dict) else None
        words = " ".join(str(reason or answer.text).split())[:300] or "no answer"
        where, code = f"{self._address}/{route}", f"HTTP {answer.status}: {words}" if answer.status else words
        if answer.status in REFUSED:
            return ConfigError(f"{where}: refuses the key ({code}); set {KEY_VARIABLE} to one that may write")
        if answer.status in PASSING:
            attempts = 1 + self._config.retries
            return StorageError(f"{where}: not reached in {attempts} attempts ({code}); run the same command to resume")
        return DataError(f"{where}: refuses what we send ({code}); correct that and run the same command to resume")


def _json(answer: Answer) -> Any:
    """The JSON value of an answer; None where it has none."""
    try:
        return json.loads(answer.text)
    except (ValueError, RecursionError):
        return None
