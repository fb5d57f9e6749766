"""Tokens as a person can read them, and as no page can be harmed by them.

A token is bytes that a stranger chose. Here they become text in which nothing is invisible: spaces are dots, newlines and tabs
arrows, control characters their Unicode pictures, invisible and direction-changing characters their code points, and bytes
that are half a character stand as ⟨E2 80⟩. Everything leaves escaped, as Markup.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup, escape

LONGEST = 64
"""Characters of one token that are shown at once; the rest waits behind a button [characters]."""
HEAD = 32
"""Characters before that button [characters]."""
SHORT = 20
"""Characters of a token in a table [characters]."""
TIP = 60
"""Characters of a token in a tooltip or a figure [characters]."""
Run = tuple[str, str]
"""A class of characters ("" plain, "ws" whitespace, "nl" newline, "mark" a stand-in) and what to show."""


@dataclass(frozen=True)
class Piece:
    """One token of the vocabulary."""

    token: int
    """Its id."""
    raw: bytes
    """Its bytes, or what it is called where it is special."""
    is_special: bool
    """Whether it marks something, as BOS does, and is no text."""

    @cached_property
    def plain(self) -> str:
        """Readable in one line, cut to a tooltip's length; not escaped."""
        shown = "".join(text for _, text in runs(self.raw, dots_from=1)) or "⟨empty⟩"
        return shown if len(shown) <= TIP else f"{shown[: TIP - 1]}…"

    @cached_property
    def short(self) -> Markup:
        """Readable in a table: cut, without a button; the tooltip has more."""
        found = list(runs(self.raw, dots_from=1))
        if self.is_special or sum(len(text) for _, text in found) <= SHORT:
            return self.html
        return Markup('<span data-tip="{}">{}…</span>').format(self.plain, _html(_cut(found, SHORT)[0]))

    @cached_property
    def html(self) -> Markup:
        """Readable, with every space a dot."""
        if self.is_special:
            return Markup('<span class="special">{}</span>').format(self.plain)
        return marked(self.raw, dots_from=1) or Markup('<span class="mark">⟨empty⟩</span>')


def unknown_piece(token: int) -> Piece:
    """What stands for an id that the vocabulary lacks."""
    return Piece(token, f"⟨token {token}⟩".encode(), is_special=True)


def runs(raw: bytes, dots_from: int) -> Iterator[Run]:
    """`raw` in stretches of one class; spaces are dots where at least `dots_from` of them stand side by side, or at an edge."""
    text = raw.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    place = 0
    while place < len(text):
        kind = _kind(text[place])
        stop = place + 1
        while stop < len(text) and _kind(text[stop]) == kind:
            stop += 1
        stretch = text[place:stop]
        if kind == "space":
            is_dotted = len(stretch) >= dots_from
            yield ("ws", "·" * len(stretch)) if is_dotted else ("", stretch)
        elif kind == "byte":
            yield "mark", f"⟨{' '.join(f'{ord(sign) - 0xDC00:02X}' for sign in stretch)}⟩"
        elif kind == "nl":
            yield from (("nl", "↵") for _ in stretch)
        elif kind == "tab":
            yield "ws", "→" * len(stretch)
        elif kind == "control":
            yield "mark", "".join(chr(0x2421) if sign == "\x7f" else chr(0x2400 + ord(sign)) for sign in stretch)
        elif kind == "hidden":
            yield "mark", "".join(f"⟨U+{ord(sign):04X}⟩" for sign in stretch)
        else:
            yield "", stretch
        place = stop


def _kind(sign: str) -> str:
    """The class of one character. Cf, Co, Cs and the like are characters that cannot be seen or that turn others around."""
    if sign == " ":
        return "space"
    if sign == "\n":
        return "nl"
    if sign == "\t":
        return "tab"
    if "\udc80" <= sign <= "\udcff":
        return "byte"
    if sign < " " or sign == "\x7f":
        return "control"
    if sign < "\x7f":
        return ""
    category = unicodedata.category(sign)
    return "hidden" if category[0] == "C" or category in ("Zl", "Zp", "Zs") else ""


def marked(raw: bytes, dots_from: int) -> Markup:
    """`raw` as escaped HTML; what is longer than LONGEST characters ends in a button that shows the rest."""
    found = list(runs(raw, dots_from))
    length = sum(len(text) for _, text in found)
    if length <= LONGEST:
        return _html(found)
    head, rest = _cut(found, HEAD)
    button = Markup('<button type="button" class="unfold" aria-expanded="false">… {} more characters</button>')
    return _html(head) + button.format(f"{length - HEAD:,}") + Markup("<span hidden>{}</span>").format(_html(rest))


def _cut(found: list[Run], length: int) -> tuple[list[Run], list[Run]]:
    head: list[Run] = []
    for place, (kind, text) in enumerate(found):
        if len(text) >= length:
            return [*head, (kind, text[:length])], [(kind, text[length:]), *found[place + 1 :]]
        head.append((kind, text))
        length -= len(text)
    return head, []


def _html(found: list[Run]) -> Markup:
    spans = (f'<span class="{kind}">{escape(text)}</span>' if kind else str(escape(text)) for kind, text in found)
    return Markup("".join(spans))


def running(pieces: list[Piece]) -> Markup:
    """Tokens side by side as one text: characters that several tokens share are whole, single spaces stay spaces.

    Special tokens and overlong ones stand by themselves, the latter cut: such text is often inside what can be clicked itself.
    """
    html, pending = Markup(""), b""
    for piece in pieces:
        if piece.is_special or len(piece.raw) > LONGEST:
            html += marked_text(pending) + piece.short
            pending = b""
        else:
            pending += piece.raw
    return html + marked_text(pending)


def marked_text(raw: bytes) -> Markup:
    """A stretch of text, however long, as escaped HTML without a button."""
    return _html(list(runs(raw, dots_from=2)))
