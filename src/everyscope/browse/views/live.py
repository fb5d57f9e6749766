"""What the text and steer pages show: the forms, and what the language model answered."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from everyscope.base.errors import ConfigError
from everyscope.browse.links import Links
from everyscope.browse.live import MAX_NEW_TOKENS, MAX_TEXT, Asking, Push, TokenReading
from everyscope.browse.pieces import Piece, marked_text
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.views.examples import shaded, shaded_token

PER_TOKEN = 8
"""Latents listed for each token [latents]."""
OVERALL = 24
"""Latents listed for the whole text [latents]."""
PUSHES = 4
"""Latents that the steering form takes at once [latents]."""
DEFAULT_STRENGTH, MAX_STRENGTH = 1.0, 1000.0
"""Of steering, in multiples of a latent's highest activation [1]."""
LOWEST_TEMPERATURE = 0.01
"""Above 0, where the likeliest token is taken each time [1]."""
MAX_DIGITS = 12
DEFAULT_TEXT = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
)
DEFAULT_PROMPT = "def read(self, path):\n"


def default_sae(index: Index) -> SaeFacts:
    """What the forms offer first: a canonical SAE of the residual stream in the middle of the model, or the nearest to it."""
    layers = sorted({sae.site.layer for sae in index.saes})
    middle = layers[len(layers) // 2]
    return min(
        index.saes,
        key=lambda sae: (sae.site.kind != "resid_post", abs(sae.site.layer - middle), not sae.is_canonical, sae.number),
    )


def read_sae(index: Index, folder: str) -> SaeFacts:
    """The SAE that an address names; ConfigError where the suite has none such."""
    sae = index.find(folder) if folder else default_sae(index)
    if sae is None:
        raise ConfigError(f"{folder[:200]!r}: this suite has no such SAE; choose one from the list")
    return sae


def text_view(index: Index, links: Links, live: Asking, query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The text page; waits for the model where the address holds a text. ConfigError for what cannot be read."""
    sae, text = read_sae(index, first(query, "sae")), first(query, "text").replace("\r\n", "\n")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the text has {len(text):,} characters, at most {MAX_TEXT:,} are read at once; shorten it")
    found = {"sae": sae, "text": text or DEFAULT_TEXT, "saes": index.saes, "live": live, "reading": None}
    if text and live.state != "absent":
        found["reading"] = _reading(index, links, sae, live.active(text, sae.folder))
    return found


def _reading(index: Index, links: Links, sae: SaeFacts, readings: Sequence[TokenReading]) -> dict[str, Any]:
    """Every token with its latents, and the latents of the whole text, strongest first."""
    pieces = [Piece(reading.token, reading.piece, reading.is_special) for reading in readings]
    by_latent: dict[int, dict[int, float]] = {}
    for place, reading in enumerate(readings):
        for latent, value in reading.top:
            by_latent.setdefault(latent, {})[place] = value
    top = max((value for values in by_latent.values() for value in values.values()), default=1.0)
    order = sorted(by_latent, key=lambda latent: (-max(by_latent[latent].values()), latent))[:OVERALL]
    listed = {latent for reading in readings for latent, _ in reading.top[:PER_TOKEN]}
    captions = index.captions((sae, latent) for latent in {*order, *listed})
    named: dict[int, dict[str, Any]] = {
        latent: {
            "latent": latent,
            "href": links.latent(sae.folder, latent),
            **captions.get((sae.number, latent), {"label": None, "top": []}),
        }
        for latent in {*order, *listed}
    }
    tokens = [
        {
            "place": place,
            "html": shaded_token(piece, max((value for _, value in reading.top), default=0.0), top),
            "plain": piece.plain,
            "is_special": piece.is_special,
            "top": [
                {**named[latent], "value": value, "tenths": round(10 * value / top)} for latent, value in reading.top[:PER_TOKEN]
            ],
        }
        for place, (piece, reading) in enumerate(zip(pieces, readings, strict=True))
    ]
    return {
        "tokens": tokens,
        "latents": [
            {
                **named[latent],
                "highest": max(by_latent[latent].values()),
                "count": len(by_latent[latent]),
                "html": shaded(pieces, 0, by_latent[latent], max(by_latent[latent].values())),
            }
            for latent in order
        ],
    }


def steer_view(index: Index, links: Links, live: Asking, query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The steering page; waits for the model where the address holds a prompt. `query` has every value of each name."""
    prompt = first(query, "prompt").replace("\r\n", "\n")
    if len(prompt) > MAX_TEXT:
        raise ConfigError(f"the prompt has {len(prompt):,} characters, at most {MAX_TEXT:,} are read at once; shorten it")
    rows = _push_rows(index, query)
    settings = {
        "num_tokens": int(_number(query, "tokens", 40, 1, MAX_NEW_TOKENS)),
        "temperature": _temperature(query),
        "seed": int(_number(query, "seed", 0, 0, 2**31 - 1)),
    }
    found = {"prompt": prompt or DEFAULT_PROMPT, "rows": rows, "saes": index.saes, "live": live, "result": None, **settings}
    if prompt and live.state != "absent":
        pushes = [_push(index, row) for row in rows if row["latent"] is not None]
        answer = live.steer(prompt, pushes, **settings)
        found["result"] = {
            "prompt": marked_text(prompt.encode()),
            "plain": _continuation(answer.plain),
            "steered": _continuation(answer.steered),
            "is_same": answer.plain == answer.steered,
            "pushes": [_push_json(index, links, row) for row in rows if row["latent"] is not None],
        }
    return found


def _temperature(query: Mapping[str, Sequence[str]]) -> float:
    """0, or enough that logits divided by it stay finite."""
    value = _number(query, "temperature", 0.7, 0.0, 10.0)
    if 0 < value < LOWEST_TEMPERATURE:
        raise ConfigError(f"temperature {value:g}: expected 0, or a number from {LOWEST_TEMPERATURE:g} to 10")
    return value


def _continuation(tokens: Sequence[bytes]) -> Markup:
    return marked_text(b"".join(tokens))


def _push_rows(index: Index, query: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The rows of the form: those that the address fills, and an empty one."""
    latents, strengths, saes = (list(query.get(name, ()))[:PUSHES] for name in ("latent", "strength", "sae"))
    rows = []
    for place, typed in enumerate(latents):
        if not typed.strip():
            continue
        sae = read_sae(index, saes[place] if place < len(saes) else "")
        # Of a number too long for any SAE Python would refuse to make an int.
        if not typed.strip().isdecimal() or len(typed.strip()) > MAX_DIGITS or int(typed) >= sae.width:
            raise ConfigError(f"latent {typed[:40]!r}: expected a number from 0 to {sae.width - 1}")
        strength = _number(
            {"strength": [strengths[place] if place < len(strengths) else ""]},
            "strength",
            DEFAULT_STRENGTH,
            -MAX_STRENGTH,
            MAX_STRENGTH,
        )
        rows.append({"sae": sae, "latent": int(typed), "strength": strength})
    if len(rows) < PUSHES:
        rows.append({"sae": rows[-1]["sae"] if rows else default_sae(index), "latent": None, "strength": DEFAULT_STRENGTH})
    return rows


def _push(index: Index, row: dict[str, Any]) -> Push:
    """In raw units: the form speaks in multiples of the latent's highest activation."""
    return Push(row["sae"].folder, row["latent"], row["strength"] * _highest(index, row))


def _highest(index: Index, row: dict[str, Any]) -> float:
    details = index.details(row["sae"], row["latent"], ["max_activation"]) or {}
    return details.get("max_activation") or 1.0


def _push_json(index: Index, links: Links, row: dict[str, Any]) -> dict[str, Any]:
    sae, latent = row["sae"], row["latent"]
    return {
        **row,
        "href": links.latent(sae.folder, latent),
        **index.captions([(sae, latent)]).get((sae.number, latent), {"label": None, "top": []}),
        "raw": row["strength"] * _highest(index, row),
    }


def first(query: Mapping[str, Sequence[str]], name: str) -> str:
    """The first value of a field; nothing where there is none."""
    return next(iter(query.get(name, ())), "")


def _number(query: Mapping[str, Sequence[str]], name: str, default: float, low: float, high: float) -> float:
    typed = first(query, name).strip()
    if not typed:
        return default
    try:
        value = float(typed)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{name} {typed[:40]!r}: expected a number from {low:g} to {high:g}")
    return value
