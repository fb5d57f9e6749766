"""What needs the language model: reading a text, steering it, circuits. Only the contract is here, and waiting for it: no torch.

The pages may be started with a factory; it is called on the first request, in a thread of its own, for loading a model
takes a while and all other pages must stay available.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from everyscope.base.errors import EveryscopeError, ModelError
from everyscope.circuits.config import Latent, Target
from everyscope.circuits.graph import Graph

Float32Array = np.ndarray[Any, np.dtype[np.float32]]
MAX_TEXT = 4000
"""Characters of a text or a prompt that are taken [characters]."""
MAX_NEW_TOKENS = 200
"""Tokens that one continuation may have [tokens]."""
MAX_ASKED = 4
"""Requests that the model works on or that wait for it [requests]; a further one is asked to try again."""
MODEL_NICENESS = 10
"""Of the model's thread, 0 to 19: pages are short, and somebody waits for each."""
MAX_SECONDS = 60.0
"""What the model may take for one request, loading not counted [s]."""


@dataclass(frozen=True, eq=False)
class SaeQuestion:
    """What is asked of one SAE about a text."""

    sae_id: str
    """The SAE: its folder below the suite, as in suite.json."""
    worth: Float32Array | None = None
    """Of each latent [d_sae], what ranks latents once multiplied by activation; 0 leaves one out. None: 1 for all."""
    follow: tuple[int, ...] = ()
    """Latents whose activation on every token is wanted."""


@dataclass(frozen=True)
class TextToken:
    """One token of a text that was read."""

    token: int
    """Its id."""
    piece: bytes
    """Its bytes."""
    is_special: bool
    """Whether it marks something, as BOS does; such tokens have no latents."""


@dataclass(frozen=True)
class SaeReading:
    """What one SAE makes of a text."""

    top: tuple[tuple[tuple[int, float], ...], ...]
    """For each token the active latents with their activations [raw units], by rank; of very many, the first."""
    followed: Mapping[int, tuple[float, ...]]
    """By followed latent its activation on each token [raw units], 0 where it is silent."""


@dataclass(frozen=True)
class Reading:
    """A text as the model's tokens, and what each SAE asked about makes of them."""

    tokens: tuple[TextToken, ...]
    by_sae: tuple[SaeReading, ...]
    """In the order of the questions."""


@dataclass(frozen=True)
class Push:
    """One latent to steer."""

    sae_id: str
    """Its SAE: the folder below the suite, as in suite.json."""
    latent: int
    """Its number."""
    strength: float
    """Activation added to it at each token [raw units]; 0 changes no bit."""


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt, and how the model that is not steered sees it."""

    tokens: tuple[bytes, ...]
    """Its tokens, without the prompt."""
    kl: float | None
    """KL(drawn from || unsteered) of next-token distributions after the same text, mean [nats]; None without tokens."""
    log_probability: float | None
    """Log-probability of its tokens under the unsteered model, mean over them [nats]; None without tokens."""


@dataclass(frozen=True)
class Continuations:
    """The same prompt, continued from the same random numbers with different latents pushed."""

    columns: tuple[Continuation, ...]
    """In the order in which their pushes were given."""
    seconds: float
    """What writing took [s]."""


@dataclass(frozen=True)
class CircuitRequest:
    """An attribution graph that a page asks for."""

    prompt: str
    position: int | None = None
    """The token that is explained, from those before it, BOS at 0; None explains what follows the whole prompt."""
    target: Target = None
    """What of the next token; None takes the token at `position`, or the likeliest ones."""


@dataclass(frozen=True)
class AblationRequest:
    """Latents of a graph that are scaled, several variants at once."""

    variants: tuple[tuple[Latent, ...], ...]
    factor: float = 0.0
    """Of their activations; 0 removes them [1]."""
    freezes_attention: bool = False
    freezes_norms: bool = False


@dataclass(frozen=True)
class Ablation:
    """What one variant changed: measured in the model, and predicted by the graph."""

    targets: tuple[tuple[float, float], ...]
    """Of each target of the graph, the measured and the predicted change of its value."""
    tokens: tuple[tuple[bytes, float, float], ...]
    """Likeliest next tokens before and after, with their probability before and after [1]."""
    latents: tuple[tuple[int, float, float], ...]
    """Nodes of downstream latents that change most, with the measured and the predicted change of their activation."""


Stop = Callable[[], bool]
"""Whether an answer is not wanted any more."""
Say = Callable[[int, int], None]
"""Hears how much of a piece of work is done, of how much."""
Step = tuple[bytes | None, ...]
"""The next token of each column; None where a column has ended."""
Each = Callable[[Step], None]
"""Receives each step as soon as it is made."""


class Live(Protocol):
    """A language model with a suite's SAEs. Called from one thread at a time; may raise any EveryscopeError."""

    def read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
        """Every token of `text`, specials too, with the latents that are active there."""
        ...

    def write(
        self,
        prompt: str,
        columns: Sequence[Sequence[Push]],
        *,
        num_tokens: int,
        temperature: float,
        seed: int,
        each: Each = lambda step: None,
        stop: Stop = lambda: False,
    ) -> Continuations:
        """Continue `prompt` by `num_tokens` once for each column's pushes; temperature 0 takes the likeliest token each time.

        Hands every step to `each`. Asks `stop` between tokens, and raises Stopped where it says so.
        """
        ...

    def draw(self, request: CircuitRequest, path: Path, *, say: Say, stop: Stop = lambda: False) -> None:
        """Write the attribution graph to `path`; `say` hears how many latents are done, of how many.

        Asks `stop` between blocks of latents, and raises Stopped where it says so.
        """
        ...

    def ablate(self, graph: Graph, request: AblationRequest) -> Sequence[Ablation]:
        """Scale latents of a graph in the model, and say what each variant changed."""
        ...


class Stopped(EveryscopeError):
    """The work was given up: the page was closed, or it took too long."""


class Busy(EveryscopeError):
    """Too many wait for the language model already."""


Result = TypeVar("Result")
LiveFactory = Callable[[], Live]
State = Literal["absent", "asleep", "loading", "ready", "failed"]


class LiveModel:
    """A factory, the thread in which it and all it makes work, and how far that is."""

    def __init__(self, factory: LiveFactory | None) -> None:
        """None: the pages that need a model say what would bring it."""
        self._factory = factory
        self._model: Live | None = None
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._num_asked = 0
        self.done: tuple[int, int] | None = None
        """How much of the present piece of work is done, of how much; None where it does not say."""
        self.state: State = "asleep" if factory else "absent"

    def asking(self) -> "Asking":
        """What one request does with the model."""
        return Asking(self)

    def work(self, work: Callable[[Live], Result], asking: "Asking") -> Result:
        """Wait for `work` in the model's thread.

        Busy where MAX_ASKED wait already, Stopped where `asking` was given up, ModelError where there is no model.
        """
        factory = self._factory
        if factory is None:
            raise ModelError("no language model is attached; start the pages with `everyscope browse SUITE`")
        with self._lock:
            if self._num_asked >= MAX_ASKED:
                raise Busy(f"{MAX_ASKED} requests wait for the language model already; try again in a moment")
            self._num_asked += 1
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="language-model", initializer=_give_way)

        def begin() -> Result:
            if asking.is_given_up:
                raise Stopped("the page was closed")
            model = self._loaded(factory)
            asking.begin()
            try:
                return work(model)
            finally:
                self.done = None

        try:
            return self._thread.submit(begin).result()
        finally:
            with self._lock:
                self._num_asked -= 1

    def _loaded(self, factory: LiveFactory) -> Live:
        """The model, loaded if it is not; only the model's own thread calls this."""
        if self._model is not None:
            return self._model
        self.state = "loading"
        try:
            self._model = model = factory()
        finally:  # the error is raised for this request, and the next one tries again
            self.state = "failed" if self._model is None else "ready"
        return model

    def close(self) -> None:
        """Take no more work; what runs is left to end."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    """Let the threads that answer pages go first, where the system has priorities of threads: Linux does."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), MODEL_NICENESS)


class Asking:
    """One request to the language model, which may be given up while it waits or works."""

    def __init__(self, model: LiveModel) -> None:
        """Not begun yet."""
        self._model, self._given_up, self._deadline = model, threading.Event(), float("inf")

    @property
    def state(self) -> State:
        """How far the model is."""
        return self._model.state

    @property
    def is_given_up(self) -> bool:
        """Whether it was given up, or has taken too long."""
        return self._given_up.is_set() or time.monotonic() > self._deadline

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        self._given_up.set()

    def begin(self) -> None:
        """The model is loaded and works on it: from now on its time is counted."""
        self._deadline = time.monotonic() + MAX_SECONDS

    def read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
        """See Live; waits for the model. Raises what LiveModel.work does."""
        return self._model.work(lambda live: live.read(text, questions), self)

    def write(
        self, prompt: str, columns: Sequence[Sequence[Push]], *, each: Each = lambda step: None, **settings: Any
    ) -> Continuations:
        """See Live; waits for the model. Raises what LiveModel.work does."""
        return self._model.work(
            lambda live: live.write(prompt, columns, **settings, each=each, stop=lambda: self.is_given_up), self
        )

    def draw(self, request: CircuitRequest, path: Path) -> None:
        """See Live; waits for the model, whose `done` says how far it is. Raises what LiveModel.work does."""

        def say(done: int, of: int) -> None:
            self._model.done = (done, of)

        self._model.work(lambda live: live.draw(request, path, say=say, stop=lambda: self.is_given_up), self)

    def ablate(self, graph: Graph, request: AblationRequest) -> Sequence[Ablation]:
        """See Live; waits for the model. Raises what LiveModel.work does."""
        return self._model.work(lambda live: live.ablate(graph, request), self)
