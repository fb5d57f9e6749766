"""Asking the pages without a network, and a language model that is none."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from invented_graph import invented_graph

from everyscope.browse.live import (
    Ablation,
    AblationRequest,
    CircuitRequest,
    Continuation,
    Continuations,
    Each,
    Push,
    Reading,
    SaeQuestion,
    SaeReading,
    Say,
    Stop,
    TextToken,
)
from everyscope.circuits.graph import LATENT, Graph
from everyscope.circuits.writing import write_graph


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(
    app: Callable,
    address: str,
    host: str = "127.0.0.1:8017",
    headers: Mapping[str, str] | None = None,
    form: bytes | None = None,
    receive: Callable | None = None,
) -> Answer:
    """GET `address` of an ASGI application in this process, or POST a `form` to it."""
    parts, given = urlsplit(address), {"host": host, **(headers or {})}
    if form is not None:
        given = {"content-type": "application/x-www-form-urlencoded", **given}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET" if form is None else "POST",
        "scheme": "http",
        "path": unquote(parts.path),
        "raw_path": parts.path.encode(),
        "query_string": parts.query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 8017),
        "client": ("127.0.0.1", 1),
    }
    sent: list[dict] = []

    is_sent = False

    async def whole() -> dict:
        nonlocal is_sent
        if is_sent:  # a client that waits for its answer
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": form or b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive or whole, send))
    got = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:]))


class FakeLive:
    """Tokens are words; on the i-th the latents i, 2i, ... are active with 6, 3, 2, ... Steering writes another word."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.written: list[tuple[str, Sequence[Sequence[Push]], dict]] = []
        self.drawn: list[CircuitRequest] = []
        self.ablated: list[AblationRequest] = []

    def read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
        self.asked.append((text, [question.sae_id for question in questions]))
        words = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
        tokens = [TextToken(2, b"<bos>", True)]
        tokens += [TextToken(5 + place, word.encode(), False) for place, word in enumerate(words)]
        active = [{}]
        for place in range(len(words)):
            active.append({place * (rank + 1) % 60: 6.0 / (rank + 1) for rank in range(place % 12)})
        answers = []
        for question in questions:
            top = []
            for found in active:
                scores = {n: value * (1 if question.worth is None else question.worth[n]) for n, value in found.items()}
                ranked = sorted((n for n in found if scores[n] > 0), key=lambda n: -scores[n])
                top.append(tuple((n, found[n]) for n in ranked))
            followed = {latent: tuple(found.get(latent, 0.0) for found in active) for latent in question.follow}
            answers.append(SaeReading(tuple(top), followed))
        return Reading(tuple(tokens), tuple(answers))

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
        self.written.append((prompt, columns, {"num_tokens": num_tokens, "temperature": temperature, "seed": seed}))
        is_pushed = [any(push.strength for push in pushes) for pushes in columns]
        steps = [
            tuple(b" <i>pushed</i>\n" if one else f" word{place}".encode() for one in is_pushed) for place in range(num_tokens)
        ]
        for step in steps:
            each(step)
        told = [Continuation(tuple(step[place] for step in steps), 0.5 * one, -1.5) for place, one in enumerate(is_pushed)]
        return Continuations(tuple(told), 0.25)

    def draw(self, request: CircuitRequest, path: Path, *, say: Say, stop: Stop = lambda: False) -> None:
        self.drawn.append(request)
        say(1, 2)
        write_graph(path, invented_graph([("transcoder/layer_0/width_64/average_l0_5", 64)] * 2))

    def ablate(self, graph: Graph, request: AblationRequest) -> list[Ablation]:
        """Every target falls by the number of latents, and half of that is predicted; two latents change."""
        self.ablated.append(request)
        nodes = sorted((graph.kind == LATENT).nonzero()[0].tolist(), key=lambda node: -graph.influence[node])
        return [
            Ablation(
                tuple((-1.0 * len(some), -0.5 * len(some)) for _ in graph.facts.targets),
                ((b"<b>value</b>", 0.75, 0.5), (b" name", 0.125, 0.25)),
                ((nodes[0], -1.5, -1.0), (nodes[12], 0.5, -0.25), (nodes[-1], 0.25, 0.0)),
            )
            for some in request.variants
        ]
