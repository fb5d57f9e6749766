"""What questions to a language model will cost, said before any is asked, and the limits that hold while they are asked."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from everyscope.base.errors import ConfigError
from everyscope.base.progress import human_count
from everyscope.describe.explanations.config import EndpointConfig
from everyscope.describe.explanations.prompts import DETECT, EXPLAIN, FUZZ
from everyscope.describe.explanations.wording import MAX_LABEL

BYTES_PER_TOKEN = 3
"""Bytes of text that a foreign tokenizer makes one token of: most make fewer tokens, so quotes are rather high [bytes]."""
FRAME_TOKENS = 16
"""Tokens of a request beyond its text [tokens]."""


@dataclass(frozen=True)
class Quote:
    """An upper estimate of what is still to be asked."""

    requests: int
    """Requests, if none has to be repeated [requests]."""
    prompt_tokens: int
    """Estimated from bytes [tokens]."""
    completion_tokens: int
    """The limit of every answer, summed [tokens]."""

    def cost(self, endpoint: EndpointConfig) -> float | None:
        """In the currency of the prices; None without prices."""
        return _money(endpoint, self.prompt_tokens, self.completion_tokens)

    def words(self, endpoint: EndpointConfig) -> str:
        """For the person who pays."""
        cost = self.cost(endpoint)
        money = "no prices given" if cost is None else f"at most about {cost:.2f} at the given prices"
        return (
            f"{endpoint.model}: {self.requests} requests, about {human_count(self.prompt_tokens)} prompt tokens, "
            f"at most {human_count(self.completion_tokens)} completion tokens; {money}"
        )


def questions_per_latent(endpoint: EndpointConfig) -> int:
    """One for the label; then detection and fuzzing, each with the latent's own label and with another's, in batches."""
    return 1 + 2 * 2 * -(-endpoint.judged_windows // endpoint.windows_per_request)


def quote(endpoint: EndpointConfig, num_saes: int, window_bytes: float, num_paid: int) -> Quote:
    """The cost of labelling and judging in `num_saes` SAEs, less `num_paid` answers that were paid before.

    `window_bytes` is the mean length of a window [bytes].
    """
    latents = num_saes * endpoint.num_latents
    judgements = latents * (questions_per_latent(endpoint) - 1)
    shown = window_bytes + 4 * BYTES_PER_TOKEN  # numbers, marks
    asked = max(len(DETECT.encode()), len(FUZZ.encode())) + MAX_LABEL + endpoint.windows_per_request * shown
    explained = len(EXPLAIN.encode()) + endpoint.num_examples * shown
    whole = latents + judgements
    prompt = (latents * explained + judgements * asked) / BYTES_PER_TOKEN + whole * FRAME_TOKENS
    left = max(whole - num_paid, 0)
    return Quote(left, round(prompt * left / whole), left * endpoint.max_completion_tokens)


def refuse_beyond(endpoint: EndpointConfig, expected: Quote) -> None:
    """ConfigError where the quote passes a limit: nothing has been sent yet."""
    if expected.requests > endpoint.max_requests:
        raise ConfigError(
            f"{expected.requests} requests are needed, max_requests={endpoint.max_requests} allows fewer; "
            "raise it, or lower num_latents, judged_windows or the pattern saes"
        )
    cost = expected.cost(endpoint)
    if endpoint.max_cost is not None and cost is not None and cost > endpoint.max_cost:
        raise ConfigError(
            f"the requests may cost {cost:.2f}, max_cost={endpoint.max_cost} allows less; "
            "raise it, or lower num_latents, judged_windows or max_completion_tokens"
        )


class Budget:
    """What has been sent and spent in this run, shared by all threads. Attempts that fail count as requests."""

    def __init__(self, endpoint: EndpointConfig) -> None:
        """Nothing is spent yet."""
        self._endpoint, self._lock = endpoint, threading.Lock()
        self.requests, self.prompt_tokens, self.completion_tokens, self._held = 0, 0, 0, 0.0

    @property
    def cost(self) -> float | None:
        """Spent so far, in the currency of the prices; None without prices."""
        return _money(self._endpoint, self.prompt_tokens, self.completion_tokens)

    def reserve(self, prompt_tokens: int) -> None:
        """Before an attempt: ConfigError where it, or its longest answer, could pass a limit."""
        endpoint = self._endpoint
        most = _money(endpoint, prompt_tokens, endpoint.max_completion_tokens) or 0.0
        with self._lock:
            if self.requests + 1 > endpoint.max_requests:
                raise ConfigError(
                    f"{self.requests} requests are sent, max_requests={endpoint.max_requests} allows no more (repeated ones "
                    "count); what is paid is kept: raise it and run the same command to resume"
                )
            if endpoint.max_cost is not None and (self.cost or 0.0) + self._held + most > endpoint.max_cost:
                raise ConfigError(
                    f"{self.cost:.4f} is spent, and the next request could pass max_cost={endpoint.max_cost}; "
                    "what is paid is kept: raise it and run the same command to resume"
                )
            self.requests += 1
            self._held += most

    def settle(self, reserved: int, prompt_tokens: int, completion_tokens: int) -> None:
        """After the attempt for which `reserve(reserved)` was called: what it did cost, zeros where it failed."""
        most = _money(self._endpoint, reserved, self._endpoint.max_completion_tokens) or 0.0
        with self._lock:
            self._held -= most
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens


def estimated_tokens(texts: Sequence[str]) -> int:
    """Tokens of some text by its length [tokens]."""
    return sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN + FRAME_TOKENS


def _money(endpoint: EndpointConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    if endpoint.price_prompt is None or endpoint.price_completion is None:
        return None
    return (prompt_tokens * endpoint.price_prompt + completion_tokens * endpoint.price_completion) / 1e6
