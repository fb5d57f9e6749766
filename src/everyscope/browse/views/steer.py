"""The steering page: what the form says, and what the model wrote for it."""

import codecs
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from everyscope.base.errors import ConfigError
from everyscope.browse.links import Links
from everyscope.browse.live import MAX_NEW_TOKENS, Asking, Continuation, Push, Step
from everyscope.browse.pieces import marked_text, runs
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.views.fields import (
    INDEX_SECONDS,
    Query,
    captioned,
    default_sae,
    example,
    first,
    number,
    read_latent,
    read_sae,
    read_text,
)

PUSHES = 4
"""Latents that the steering form takes at once [latents]."""
DEFAULT_STRENGTH, MAX_STRENGTH = 0.5, 1000.0
"""Of steering, in multiples of a latent's highest activation [1]. The default is the largest strength of a sweep at which at most
5 % of the continuations repeat themselves, over latents of the residual stream (benchmarks/browsing.py)."""
SWEEP = (-0.5, 0.0, 0.25, 0.5, 1.0)
"""Strengths of the first latent in a sweep [1]; the others keep their ratio to it."""
LOWEST_TEMPERATURE = 0.01
"""Above 0, where the likeliest token is taken each time [1]."""
TAIL, LONGEST_PERIOD = 20, 6
"""A text repeats itself where its last TAIL tokens are one stretch of at most LONGEST_PERIOD over and over [tokens]."""


@dataclass(frozen=True)
class PushRow:
    """One row of the form."""

    sae: SaeFacts
    latent: int | None
    strength: float
    """In multiples of the latent's highest activation [1]."""


@dataclass(frozen=True)
class SteerRequest:
    """What the form says."""

    prompt: str
    rows: tuple[PushRow, ...]
    """Those that name a latent."""
    is_sweep: bool
    num_tokens: int
    temperature: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of sampling, as Live.write takes them."""
        return {"num_tokens": self.num_tokens, "temperature": self.temperature, "seed": self.seed}

    @property
    def strengths(self) -> list[list[float]]:
        """For each column the strength of each row; the first column is the unsteered one, but where a sweep has it at its 0."""
        own = [row.strength for row in self.rows]
        if not self.is_sweep or not own:
            return [[0.0] * len(own), own]
        lead = next((strength for strength in own if strength), None)
        return [[strength / lead * amount if lead else amount for strength in own] for amount in SWEEP]


def steer_request(index: Index, query: Query) -> SteerRequest:
    """From a form or an address; ConfigError for what cannot be read, and for a sweep that would push beyond MAX_STRENGTH."""
    asked = SteerRequest(
        prompt=read_text(query, "prompt"),
        rows=tuple(_push_rows(index, query)),
        is_sweep=bool(first(query, "sweep")),
        num_tokens=int(number(first(query, "tokens"), "tokens", 40, 1, MAX_NEW_TOKENS)),
        temperature=_temperature(query),
        seed=int(number(first(query, "seed"), "seed", 0, 0, 2**31 - 1)),
    )
    strongest = max((abs(strength) for column in asked.strengths for strength in column), default=0.0)
    if strongest > MAX_STRENGTH:
        raise ConfigError(f"a sweep of these strengths would push by {strongest:.3g}; bring them closer together")
    return asked


def steer_view(index: Index, links: Links, live: Asking, query: Query) -> dict[str, Any]:
    """The steering page; waits for the model where the address holds a prompt and does not leave the start to the page."""
    asked, is_started = steer_request(index, query), bool(first(query, "start"))
    spare = PushRow(asked.rows[-1].sae if asked.rows else default_sae(index), None, DEFAULT_STRENGTH)
    rows = [*asked.rows, *([spare] if len(asked.rows) < PUSHES else [])]
    found = {
        "asked": asked,
        "prompt": asked.prompt or example(index)[1],
        "rows": [
            {"sae": row.sae, "latent": row.latent, "strength": row.strength, "named": named(index, links, row)} for row in rows
        ],
        "default_strength": DEFAULT_STRENGTH,
        "max_pushes": PUSHES,
        "saes": index.saes,
        "live": live,
        "is_started": is_started and bool(asked.prompt),
        "result": None,
    }
    if asked.prompt and not is_started and live.state != "absent":
        found["result"] = steer(index, links, live, asked)
    return found


def steer(
    index: Index, links: Links, live: Asking, asked: SteerRequest, each: Callable[[Step], None] = lambda step: None
) -> dict[str, Any]:
    """What the model writes for a request, as the page shows it; hands every step to `each`."""
    for row in asked.rows:
        index.require(row.sae, INDEX_SECONDS)
    highest = [highest_activation(index, row) for row in asked.rows]
    strengths = asked.strengths
    columns = [
        [
            Push(row.sae.folder, row.latent or 0, strength * top)
            for row, strength, top in zip(asked.rows, own, highest, strict=True)
        ]
        for own in strengths
    ]
    answer = live.write(asked.prompt, columns, each=each, **asked.settings)
    unsteered = next(place for place, own in enumerate(strengths) if not any(own))
    plain = _text(answer.columns[unsteered])
    return {
        "prompt": marked_text(asked.prompt.encode()),
        "columns": [
            _column_view(column, own, plain, is_steered=place != unsteered)
            for place, (own, column) in enumerate(zip(strengths, answer.columns, strict=True))
        ],
        "rate": max(len(column.tokens) for column in answer.columns) / max(answer.seconds, 1e-9),
        "is_same": all(column.tokens == answer.columns[unsteered].tokens for column in answer.columns),
        "pushes": [
            {**captioned(index, links, row.sae, [row.latent])[row.latent], "strength": row.strength, "raw": row.strength * top}
            for row, top in zip(asked.rows, highest, strict=True)
            if row.latent is not None
        ],
        "is_sweep": asked.is_sweep,
    }


def column_titles(asked: SteerRequest) -> list[str]:
    """What stands above each column."""
    return [_title(own) for own in asked.strengths]


def _title(strengths: Sequence[float]) -> str:
    return " ".join(f"{strength:+.3g}×".replace("-", "−") for strength in strengths) if any(strengths) else "as it is"


def _text(column: Continuation) -> str:
    return b"".join(column.tokens).decode("utf-8", "surrogateescape")


def _column_view(column: Continuation, strengths: Sequence[float], plain: str, *, is_steered: bool) -> dict[str, Any]:
    return {
        "title": _title(strengths),
        "is_steered": is_steered,
        "html": differing(plain, _text(column)),
        "kl": column.kl if is_steered else None,
        "log_probability": column.log_probability,
        "repeats": repeats(column.tokens),
    }


def differing(plain: str, text: str) -> Markup:
    """`text` with the words marked that `plain` has not, or not there; surrogates stand for bytes that are no text."""
    ours, theirs = (re.findall(r"\w+|\s+|[^\w\s]", one) for one in (text, plain))
    html = Markup("")
    for kind, start, stop, _, _ in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        part = marked_text("".join(ours[start:stop]).encode("utf-8", "surrogateescape"))
        html += part if kind == "equal" or start == stop else Markup("<mark>{}</mark>").format(part)
    return html


def repeats(tokens: Sequence[bytes]) -> bool:
    """Whether the last TAIL tokens are one stretch of at most LONGEST_PERIOD tokens over and over."""
    tail = tokens[-TAIL:]
    return len(tail) == TAIL and any(tail[period:] == tail[:-period] for period in range(1, LONGEST_PERIOD + 1))


class Shown:
    """Columns as they are written: of each step, what can be shown of it, as runs of pieces.Run."""

    def __init__(self, count: int) -> None:
        """Of `count` empty columns."""
        self._decoders = [codecs.getincrementaldecoder("utf-8")("surrogateescape") for _ in range(count)]
        self._tokens: list[list[bytes]] = [[] for _ in range(count)]

    def add(self, step: Step) -> dict[str, Any]:
        """For scripts: by column the new text; half a character waits for its other half. And which columns repeat themselves."""
        parts: list[list[tuple[str, str]]] = []
        for token, decoder, tokens in zip(step, self._decoders, self._tokens, strict=True):
            if token is not None:
                tokens.append(token)
            text = decoder.decode(token or b"", final=token is None)
            parts.append(list(runs(text.encode("utf-8", "surrogateescape"), dots_from=2)))
        return {"parts": parts, "repeats": [repeats(tokens) for tokens in self._tokens]}


def _temperature(query: Query) -> float:
    """0, or enough that logits divided by it stay finite."""
    value = number(first(query, "temperature"), "temperature", 0.7, 0.0, 10.0)
    if 0 < value < LOWEST_TEMPERATURE:
        raise ConfigError(f"temperature {value:g}: expected 0, or a number from {LOWEST_TEMPERATURE:g} to 10")
    return value


def _push_rows(index: Index, query: Query) -> list[PushRow]:
    """The rows of the form that name a latent."""
    latents, strengths, saes = (list(query.get(name, ()))[:PUSHES] for name in ("latent", "strength", "sae"))
    rows = []
    for place, typed in enumerate(latents):
        if not typed.strip():
            continue
        sae = read_sae(index, saes[place] if place < len(saes) else "")
        given = strengths[place] if place < len(strengths) else ""
        rows.append(
            PushRow(sae, read_latent(typed, sae), number(given, "strength", DEFAULT_STRENGTH, -MAX_STRENGTH, MAX_STRENGTH))
        )
    return rows


def highest_activation(index: Index, row: PushRow) -> float:
    """The latent's highest activation [raw units]; 1 where it was not measured. The form uses multiples of it."""
    details = index.details(row.sae, row.latent or 0, ["max_activation"]) or {}
    return details.get("max_activation") or 1.0


def named(index: Index, links: Links, row: PushRow) -> dict[str, Any] | None:
    """A row's latent, as the templates name it; None where the row is empty."""
    return None if row.latent is None else captioned(index, links, row.sae, [row.latent])[row.latent]


def caption_view(index: Index, links: Links, query: Query) -> dict[str, Any]:
    """What one latent is called, for a form in which somebody has just chosen it."""
    sae = read_sae(index, first(query, "sae"))
    row = PushRow(sae, read_latent(first(query, "latent"), sae), 0.0)
    return {"item": named(index, links, row), "highest": highest_activation(index, row)}
