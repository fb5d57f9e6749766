"""Labels as people read them: quoted tokens as chips, whitespace in the signs that tokens have everywhere, quality in a word."""

import re
from typing import Any

from markupsafe import Markup, escape

GLYPHS = {"␣": "·", "⏎": "↵", "⇥": "→", "␍": "␍"}
"""How labels spell whitespace, and how pages do."""
LONGEST_RUN = 8
"""Whitespace up to here stands in full; of more, a label says how many [characters]."""
QUALITIES = (("strong", 0.25), ("weak", 0.1), ("poor", float("-inf")))
"""What a label is called from which quality on, which is detection minus that of other latents' labels [1]."""
KINDS = {
    "token": "tells by the token itself",
    "word class": "tells by the kind of word",
    "topic": "tells by what the text is about",
    "context": "tells by what stands around the token",
    "syntax": "tells by Python’s syntax",
    "position": "tells by the place in the text",
    "mixed": "tells by several things",
}
"""What a rule is about, in words."""
_RUN = re.compile(r"([␣⏎⇥␍])×(\d{1,6})")
_SIGNS = re.compile(f"[{''.join(GLYPHS.values())}]+")


def label_html(label: str | None) -> Markup:
    """A label with its quoted tokens as chips."""
    html = Markup("")
    for place, part in enumerate((label or "").split("`")):
        if place % 2 == 0:
            html += escape(part)
        elif part:
            html += Markup('<code class="chip">{}</code>').format(_token(part))
    return html


def label_plain(label: str | None) -> str:
    """A label for titles and tips, its tokens in quotation marks."""
    parts = (label or "").split("`")
    return "".join(f"“{_signs(part)}”" if place % 2 else part for place, part in enumerate(parts))


def _signs(token: str) -> str:
    """Whitespace in the signs of pages."""

    def run(found: re.Match[str]) -> str:
        sign, count = GLYPHS[found[1]], int(found[2])
        return sign * count if count <= LONGEST_RUN else f"{sign}×{count}"

    return "".join(GLYPHS.get(sign, sign) for sign in _RUN.sub(run, token))


def _token(token: str) -> Markup:
    shown, place, html = _signs(token), 0, Markup("")
    for found in _SIGNS.finditer(shown):
        html += escape(shown[place : found.start()]) + Markup('<span class="ws">{}</span>').format(found[0])
        place = found.end()
    return html + escape(shown[place:])


def quality_of(quality: float | None) -> str:
    """One word for how well a label tells where its latent fires; empty where nobody has measured it."""
    return "" if quality is None else next(word for word, least in QUALITIES if quality >= least)


def dot(item: dict[str, Any]) -> Markup:
    """A dot for the quality of `item`'s label, in words for those who cannot see it."""
    if not item.get("label"):
        return Markup('<span class="dot q-none" data-tip="no label"></span>')
    word = quality_of(item.get("quality"))
    if not word:
        return Markup('<span class="dot q-unknown" data-tip="label without a score"></span>')
    tip = f"{word} label: detection {item['quality']:.2f} above that of other latents’ labels"
    return Markup('<span class="dot q-{}" data-tip="{}"><span class="hidden">{} label: </span></span>').format(word, tip, word)


def kind_in_words(kind: str | None) -> str:
    """What a rule is about."""
    return KINDS.get(kind or "", kind or "")
