"""Asking an OpenAI-compatible endpoint over HTTP, with nothing but Python's own library.

The key is read from the environment for each run, sent to the configured host alone (redirects are not followed, a key is
not sent in clear text to another machine), and taken out of whatever comes back. Calls to this machine use no proxy.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from everyscope.base.errors import ConfigError, ModelError
from everyscope.base.http import is_loopback, opener_for
from everyscope.base.ids import content_id
from everyscope.describe.explanations.budget import Budget, estimated_tokens
from everyscope.describe.explanations.config import EndpointConfig
from everyscope.describe.explanations.prompts import Messages
from everyscope.describe.explanations.replies import ANSWERED, MALFORMED, Replies, Reply
from everyscope.describe.explanations.wording import safe_label

MAX_REPLY = 1 << 22
"""Bytes of a reply that are read at most [bytes]."""
MAX_WAIT_S = 60.0
"""Longest wait before another attempt, whatever the endpoint asks for [s]."""
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP codes after which another attempt may do better."""


@dataclass(frozen=True)
class Question:
    """One request, and what it is for."""

    purpose: str
    """explain, detection or fuzzing."""
    latent: int
    label_of: int
    """The latent whose label is judged, -1 where a label is asked for."""
    messages: Messages
    seed: int


@dataclass(frozen=True)
class _Outcome:
    """What one attempt gave."""

    status: str
    raw: str
    retry_after: float | None = None
    is_final: bool = False
    """True where no further attempt can help."""


class Endpoint:
    """A language model behind HTTP."""

    def __init__(self, config: EndpointConfig, budget: Budget, wait: Callable[[float], None] = time.sleep) -> None:
        """Sends nothing yet; ConfigError where a key would go over the net in clear text. `wait` sleeps between attempts [s]."""
        self._config, self._budget, self._wait = config, budget, wait
        self._stopping = threading.Event()
        self._key = os.environ.get(config.key_variable, "")
        parts = urlsplit(config.url)
        host = parts.hostname or ""
        if self._key and parts.scheme == "http" and not is_loopback(host):
            raise ConfigError(f"{config.url}: would send the key in clear text; use https, or unset {config.key_variable}")
        self._opener = opener_for(host)

    def ask(self, questions: Sequence[Question], replies: Replies, done: Callable[[int], None]) -> list[Reply]:
        """The answers to all questions, in order: those that are paid for from `replies`, the others sent and kept there.

        ModelError where the endpoint refuses or does not answer; ConfigError at the limits of the budget. What came before
        either is kept.
        """

        def answer(key: str, question: Question) -> Reply:
            if self._stopping.is_set():
                raise ModelError(f"{self._config.url}: not asked, for another question failed")
            return replies.paid(key) or self._send(key, question, replies)

        keys = [self._identity(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))  # two labels may be equal, and so their questions
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            coming = {key: pool.submit(answer, key, question) for key, question in distinct.items()}
            found = []
            for key in keys:
                found.append(coming[key].result())
                done(1)
            return found
        except BaseException:
            self._stopping.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what is under way will be paid for: let it be kept

    def _payload(self, question: Question) -> dict[str, Any]:
        config = self._config
        payload: dict[str, Any] = {"model": config.model, "messages": question.messages, "seed": question.seed}
        if config.temperature is not None:
            payload["temperature"] = config.temperature
        return payload | {config.limit_name: config.max_completion_tokens}

    def _identity(self, question: Question) -> str:
        return content_id(self._payload(question))

    def _send(self, key: str, question: Question, replies: Replies) -> Reply:
        """Ask until there is an answer or no attempt is left; each attempt is kept."""
        config, payload = self._config, self._payload(question)
        reserved = estimated_tokens([message["content"] for message in question.messages])
        outcome = _Outcome("unasked", "")
        for attempt in range(1 + config.retries):
            if attempt:
                wait = config.backoff_s * 2 ** (attempt - 1) if outcome.retry_after is None else outcome.retry_after
                self._wait(min(wait, MAX_WAIT_S))
            self._budget.reserve(reserved)
            outcome = self._attempt(payload)
            text, prompt_tokens, completion_tokens = self._read(outcome, reserved)
            status = MALFORMED if outcome.status == ANSWERED and text is None else outcome.status
            self._budget.settle(reserved, prompt_tokens, completion_tokens)
            reply = Reply(
                key,
                question.purpose,
                question.latent,
                question.label_of,
                json.dumps(question.messages, ensure_ascii=False),
                question.seed,
                status,
                outcome.raw,
                text or "",
                prompt_tokens,
                completion_tokens,
            )
            replies.add(reply)
            if reply.is_paid:
                return reply
            if outcome.is_final or self._stopping.is_set():
                break
        self._stopping.set()
        raise ModelError(
            f"{config.url}: model {config.model!r} gave no answer: {outcome.status}, {safe_label(outcome.raw)!r}; "
            f"check url, model and the key in {config.key_variable}; answers so far are kept: run the same command to resume"
        )

    def _attempt(self, payload: dict[str, Any]) -> _Outcome:
        """One HTTP request, given up after `timeout_s`."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self._config.url}/chat/completions", json.dumps(payload).encode(), headers)
        end = time.monotonic() + self._config.timeout_s
        try:
            with self._opener.open(request, timeout=self._config.timeout_s) as response:
                return _Outcome(ANSWERED, self._hidden(_body(response, end)))
        except urllib.error.HTTPError as error:
            with error:
                raw = self._hidden(error.read(MAX_REPLY).decode("utf-8", "replace"))
            return _Outcome(f"HTTP {error.code}", raw, _seconds(error.headers.get("Retry-After")), error.code not in PASSING)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return _Outcome(type(reason).__name__, self._hidden(str(reason)))

    def _read(self, outcome: _Outcome, estimate: int) -> tuple[str | None, int, int]:
        """The answer (None where there is none), prompt and completion tokens of an outcome."""
        if outcome.status != ANSWERED:
            return None, 0, 0
        limit = self._config.max_completion_tokens
        try:
            body = json.loads(outcome.raw)
            text = body["choices"][0]["message"]["content"]
            usage = body.get("usage") or {}
            counts = usage.get("prompt_tokens", estimate), usage.get("completion_tokens", limit)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return None, estimate, limit
        is_counted = all(type(count) is int and count >= 0 for count in counts)
        prompt_tokens, completion_tokens = counts if is_counted else (estimate, limit)
        return (text if isinstance(text, str) else None), prompt_tokens, completion_tokens

    def _hidden(self, text: str) -> str:
        """`text` without the key, should an endpoint repeat it."""
        return text.replace(self._key, "…") if self._key else text


def _body(response: Any, end: float) -> str:
    """The body of a response, piece by piece, so that one that drips does not go on beyond `end`; TimeoutError where it does."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if time.monotonic() > end:
            raise TimeoutError("the reply took too long")
        if len(data) > MAX_REPLY:
            raise http.client.HTTPException(f"the reply is longer than {MAX_REPLY} bytes")
    return data.decode("utf-8", "replace")


def _seconds(header: str | None) -> float | None:
    """A Retry-After header that gives seconds [s]; dates are not read."""
    try:
        return max(float(header), 0.0) if header is not None else None
    except ValueError:
        return None
