"""The text page: what one SAE, or one SAE of each layer, makes of a text.

Activations of different latents do not compare, so latents are ranked and shaded by the share of their own maximum, and those
that fire on more than DENSE of all tokens are left out, unless the form says otherwise.
"""

import re
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from everyscope.base.errors import ConfigError
from everyscope.browse.links import Links
from everyscope.browse.live import Asking, Float32Array, Reading, SaeQuestion
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.views.examples import level, plain_text, shaded, shaded_token
from everyscope.browse.views.fields import INDEX_SECONDS, Query, captioned, default_sae, example, first, read_sae, read_text
from everyscope.sites.names import SITE_TITLES
from everyscope.suite.layout import width_label

PER_TOKEN = 8
"""Latents listed for a token of one SAE [latents]."""
PER_LAYER = 3
"""Latents listed for a token in each layer [latents]."""
CARDS = 6
"""Latents shown with the whole text [latents]."""
ROWS = 300
"""Rows in the table of latents [latents]."""
DENSE = 0.1
"""Share of tokens above which a latent counts as dense [1]."""
ALL_LAYERS = "layers"
SHARE, ACTIVATION = "share", "activation"


@dataclass(frozen=True)
class Stack:
    """SAEs of one kind of site and one width, one for each layer."""

    value: str
    """What it is called in addresses."""
    title: str
    saes: tuple[SaeFacts, ...]
    """From the first layer to the last."""


def stacks(index: Index) -> list[Stack]:
    """Every choice of all layers, residual stream first: at each layer the canonical SAE, else the one of the most usual L0."""
    groups: dict[tuple[str, int], list[SaeFacts]] = {}
    for sae in index.saes:
        groups.setdefault((sae.site.kind, sae.width), []).append(sae)
    found = []
    for (kind, width), saes in sorted(groups.items(), key=lambda group: (group[0][0] != "resid_post", group[0])):
        usual = median(sae.headline["l0"] for sae in saes)
        layers = sorted({sae.site.layer for sae in saes})
        chosen = [
            min(
                (sae for sae in saes if sae.site.layer == layer),
                key=lambda sae: (not sae.is_canonical, abs(sae.headline["l0"] - usual), sae.number),
            )
            for layer in layers
        ]
        if len(layers) > 1:
            title = f"{SITE_TITLES[chosen[0].site.kind]}, all layers · width {width_label(width)}"
            found.append(Stack(f"{ALL_LAYERS}/{kind}/{width}", title, tuple(chosen)))
    return found


@dataclass(frozen=True)
class TextRequest:
    """What the form says."""

    text: str
    chosen: str
    """The value of the choice of SAEs."""
    saes: tuple[SaeFacts, ...]
    """From the first layer to the last."""
    is_stack: bool
    by: str
    """SHARE or ACTIVATION."""
    has_dense: bool
    """Whether dense latents are shown."""
    at: tuple[int, int | None] | None
    """The token that is looked at, and the layer where it is one of a stack."""


def text_request(index: Index, query: Query) -> TextRequest:
    """From a form or an address; ConfigError for what cannot be read."""
    known = {stack.value: stack for stack in stacks(index)}
    chosen = first(query, "sae")
    if not chosen:
        ours = default_sae(index)
        chosen = next((value for value, stack in known.items() if stack.saes[0].site.kind == ours.site.kind), ours.folder)
    saes = known[chosen].saes if chosen in known else (read_sae(index, chosen),)
    by = first(query, "by") or SHARE
    if by not in (SHARE, ACTIVATION):
        raise ConfigError(f"by {by[:40]!r}: expected {SHARE} or {ACTIVATION}")
    typed = first(query, "at")
    parts = re.fullmatch(r"(\d{1,7})(?:\.(\d{1,7}))?", typed, re.ASCII)
    if typed and parts is None:
        raise ConfigError(f"at {typed[:40]!r}: expected a token's number, or that and a layer's, as in 12 or 12.3")
    at = parts and (int(parts[1]), None if parts[2] is None else int(parts[2]))
    return TextRequest(read_text(query, "text"), chosen, saes, chosen in known, by, first(query, "dense") == "show", at)


def worth(index: Index, sae: SaeFacts, by: str, has_dense: bool) -> tuple[Float32Array, Float32Array]:
    """By what activations are multiplied to rank latents [d_sae], and each latent's maximum [d_sae], 0 where it is unknown.

    An SAE whose maxima nobody has measured is ranked by activation.
    """
    highest, frequency = index.scales(sae)
    known = highest > 0
    shares = np.divide(1.0, highest, out=np.zeros_like(highest), where=known)
    found = shares if by == SHARE and known.any() else np.ones_like(highest)
    return (found if has_dense else np.where(frequency > DENSE, 0, found)).astype(np.float32), highest


def text_view(index: Index, links: Links, live: Asking, query: Query) -> dict[str, Any]:
    """The text page; waits for the model where the address holds a text. ConfigError for what cannot be read."""
    asked = text_request(index, query)
    found = {
        "asked": asked,
        "text": asked.text or example(index)[0],
        "saes": index.saes,
        "stacks": stacks(index),
        "live": live,
        "reading": None,
        "pane": None,
    }
    if asked.text and live.state != "absent":
        read = _Read(index, links, live, asked)
        found["reading"] = {**(read.matrix() if asked.is_stack else read.stream()), "table": read.table(), "size": read.size}
        found["pane"] = read.pane()
    return found


class _Read:
    """A text that was read, with what the pages show of it."""

    def __init__(self, index: Index, links: Links, live: Asking, asked: TextRequest) -> None:
        self._links, self._asked = links, asked
        for sae in asked.saes:
            index.require(sae, INDEX_SECONDS)
        scales = [worth(index, sae, asked.by, asked.has_dense) for sae in asked.saes]
        questions = [SaeQuestion(sae.folder, scale) for sae, (scale, _) in zip(asked.saes, scales, strict=True)]
        self._highest = [highest for _, highest in scales]
        self._reading: Reading = live.read(asked.text, questions)
        self._pieces = [Piece(one.token, one.piece, one.is_special) for one in self._reading.tokens]
        self._places: list[dict[int, dict[int, float]]] = []
        for answer in self._reading.by_sae:
            by_latent: dict[int, dict[int, float]] = {}
            for place, top in enumerate(answer.top):
                for latent, value in top:
                    by_latent.setdefault(latent, {})[place] = value
            self._places.append(by_latent)
        self._named = [
            captioned(index, links, sae, list(by_latent)) for sae, by_latent in zip(asked.saes, self._places, strict=True)
        ]
        values = [value for by_latent in self._places for found in by_latent.values() for value in found.values()]
        self._top = max(values, default=1.0)

    @property
    def size(self) -> int:
        """Latents in the table were it whole [latents]."""
        return sum(map(len, self._places))

    def _item(self, number: int, latent: int, value: float) -> dict[str, Any]:
        """One latent that is active, as the templates show it; `amount` is what it is ranked and shaded by [1]."""
        highest = float(self._highest[number][latent])
        share = value / highest if highest > 0 else None
        amount = share if share is not None and self._asked.by == SHARE else value / self._top
        return {
            **self._named[number][latent],
            "sae": self._asked.saes[number],
            "value": value,
            "share": share,
            "amount": amount,
            "tenths": min(10, round(10 * amount)),
        }

    def _items(self, number: int, place: int, count: int) -> list[dict[str, Any]]:
        return [self._item(number, *entry) for entry in self._reading.by_sae[number].top[place][:count]]

    def stream(self) -> dict[str, Any]:
        """One SAE: every token with its latents, and the latents that fire most with the whole text."""
        tokens = []
        for place, piece in enumerate(self._pieces):
            top = self._items(0, place, PER_TOKEN)
            best = top[0]["amount"] if top else 0.0
            tokens.append(
                {
                    "place": place,
                    "html": shaded_token(piece, best, 1.0),
                    "plain": piece.plain,
                    "is_special": piece.is_special,
                    "top": top,
                    "upto": self._upto(place),
                }
            )
        cards = [
            {**item, "html": shaded(self._pieces, 0, self._places[0][item["latent"]], item["highest"])}
            for item in self.table()[:CARDS]
        ]
        return {"is_matrix": False, "tokens": tokens, "cards": cards}

    def matrix(self) -> dict[str, Any]:
        """All layers, the last first: in each cell the first latent of a token."""
        rows = []
        for number, sae in reversed(list(enumerate(self._asked.saes))):
            cells = []
            for place in range(len(self._pieces)):
                item = next(iter(self._items(number, place, 1)), None)
                if item is not None:
                    item["level"] = level(item["amount"], 1.0)
                cells.append(item)
            rows.append({"sae": sae, "layer": sae.site.layer, "cells": cells})
        tokens = [{"plain": piece.plain, "html": piece.short, "is_special": piece.is_special} for piece in self._pieces]
        return {"is_matrix": True, "rows": rows, "tokens": tokens, "cards": []}

    def table(self) -> list[dict[str, Any]]:
        """Latents of the whole text by the highest amount that each reaches."""
        rows = []
        for number, by_latent in enumerate(self._places):
            for latent, found in by_latent.items():
                rows.append((max(found.values()), number, latent, len(found)))
        items = [
            {**self._item(number, latent, highest), "highest": highest, "count": count} for highest, number, latent, count in rows
        ]
        items.sort(key=lambda item: (-item["amount"], item["sae"].number, item["latent"]))
        return items[:ROWS]

    def _upto(self, place: int) -> int:
        """Characters of the text up to this token's end: a prompt that ends here."""
        return len(plain_text(self._pieces[: place + 1]))

    def pane(self) -> dict[str, Any] | None:
        """The token that is looked at: in one layer, or through all of them; None where none is."""
        if self._asked.at is None or not self._asked.is_stack:
            return None
        place, layer = self._asked.at
        numbers = [number for number, sae in enumerate(self._asked.saes) if layer is None or sae.site.layer == layer]
        if place >= len(self._pieces) or not numbers:
            raise ConfigError(
                f"at {place}.{layer}: the text has tokens 0 to {len(self._pieces) - 1} in the layers of this choice"
            )
        count = PER_LAYER if layer is None else PER_TOKEN
        piece = self._pieces[place]
        return {
            "place": place,
            "layer": layer,
            "html": piece.html,
            "is_special": piece.is_special,
            "upto": self._upto(place),
            "layers": [
                {"layer": self._asked.saes[number].site.layer, "top": self._items(number, place, count)}
                for number in reversed(numbers)
            ],
        }


def pane_view(index: Index, links: Links, live: Asking, query: Query) -> dict[str, Any]:
    """The pane alone, for a page that shows the rest already."""
    return {"pane": text_view(index, links, live, query)["pane"]}
