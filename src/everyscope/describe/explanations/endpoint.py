"""Asking an OpenAI-compatible endpoint over HTTP. The key is read from the environment for each run."""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from everyscope.base.errors import ModelError
from everyscope.base.http import Answer, Host
from everyscope.base.ids import content_id
from everyscope.describe.explanations.budget import Budget, estimated_tokens
from everyscope.describe.explanations.config import EndpointConfig
from everyscope.describe.explanations.prompts import Messages
from everyscope.describe.explanations.replies import ANSWERED, MALFORMED, Replies, Reply
from everyscope.describe.explanations.wording import safe_label

OK = 200
MAX_WAIT_S = 60.0
"""Longest wait before another attempt, whatever the endpoint asks for [s]."""
PASSING = frozenset({0, 408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP codes after which another attempt may do better; 0 is no answer at all."""


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


class Endpoint:
    """A language model behind HTTP."""

    def __init__(self, config: EndpointConfig, budget: Budget, wait: Callable[[float], None] = time.sleep) -> None:
        """Sends nothing yet; ConfigError where a key would go over the net in clear text. `wait` sleeps between attempts [s]."""
        self._config, self._budget, self._wait = config, budget, wait
        self._stopping = threading.Event()
        key = os.environ.get(config.key_variable, "")
        self._host = Host(config.url, key, "Authorization", "Bearer ", config.timeout_s)

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
        answer = Answer(0, "", "unasked")
        for attempt in range(1 + config.retries):
            if attempt:
                self._wait(answer.pause(attempt, config.backoff_s, MAX_WAIT_S))
            self._budget.reserve(reserved)
            answer = self._host.ask("chat/completions", json.dumps(payload).encode())
            text, prompt_tokens, completion_tokens = self._read(answer, reserved)
            status = answer.outcome
            if answer.status == OK:
                status = MALFORMED if text is None else ANSWERED
            self._budget.settle(reserved, prompt_tokens, completion_tokens)
            reply = Reply(
                key,
                question.purpose,
                question.latent,
                question.label_of,
                json.dumps(question.messages, ensure_ascii=False),
                question.seed,
                status,
                answer.text,
                text or "",
                prompt_tokens,
                completion_tokens,
            )
            replies.add(reply)
            if reply.is_paid:
                return reply
            if answer.status not in PASSING or self._stopping.is_set():
                break
        self._stopping.set()
        raise ModelError(
            f"{config.url}: model {config.model!r} gave no answer: {answer.outcome}, {safe_label(answer.text)!r}; "
            f"check url, model and the key in {config.key_variable}; answers so far are kept: run the same command to resume"
        )

    def _read(self, answer: Answer, estimate: int) -> tuple[str | None, int, int]:
        """The answer (None where there is none), prompt and completion tokens of one."""
        if answer.status != OK:
            return None, 0, 0
        limit = self._config.max_completion_tokens
        try:
            body = json.loads(answer.text)
            text = body["choices"][0]["message"]["content"]
            usage = body.get("usage") or {}
            counts = usage.get("prompt_tokens", estimate), usage.get("completion_tokens", limit)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return None, estimate, limit
        is_counted = all(type(count) is int and count >= 0 for count in counts)
        prompt_tokens, completion_tokens = counts if is_counted else (estimate, limit)
        return (text if isinstance(text, str) else None), prompt_tokens, completion_tokens
