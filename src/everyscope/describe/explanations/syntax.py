"""What each byte of a stretch of Python is: keyword, parameter, docstring, indentation, ... - also where the stretch was cut.

The library's own `tokenize` gives other tokens from Python 3.12 on and stops at what it cannot read. A block of text starts and
ends anywhere, so this scanner never stops, and tries whether the stretch began inside a triple-quoted string: it believes
the reading with the fewest oddities, such as two names side by side, which code does not have and prose does.
"""

import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

KINDS = (
    "space between words",
    "line break",
    "keyword",
    "name of a function being defined",
    "name of a class being defined",
    "parameter of a function being defined",
    "imported name",
    "attribute",
    "method being called",
    "function being called",
    "keyword argument",
    "name",
    "decorator",
    "number",
    "string",
    "docstring",
    "comment",
    "opening bracket",
    "closing bracket",
    "comma",
    "colon",
    "dot",
    "operator",
)
"""What a byte can be, in words; its number stands in `Scan.kinds`."""
KIND = {kind: number for number, kind in enumerate(KINDS)}
STATEMENTS = frozenset({*keyword.kwlist, "@"} - {"None", "True", "False", "and", "in", "is", "not", "or", "await"})
"""First words of a line that make a statement of their own; any other line is "" ."""
MAX_DEPTH = 4
"""Brackets deeper than that count as that deep."""

BEGINS_INSIDE = 3
"""What it takes to believe that a stretch begins inside a string [oddities]."""

LEXEME = re.compile(
    r"""(?P<space>(?:[ \t\f\r]|\\\r?\n)+)
    |(?P<newline>\n[ \t\n\r]*)
    |(?P<comment>\#[^\n]*)
    |(?P<triple>[rRbBuUfF]{0,2}(?:\"\"\"|'''))
    |(?P<string>[rRbBuUfF]{0,2}(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
    |(?P<broken>["'][^\n]*)
    |(?P<number>(?:0[xXoObB][\da-fA-F_]+|\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)[jJ]?)
    |(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)
    |(?P<open>[(\[{])|(?P<close>[)\]}])
    |(?P<operator>->|:=|\*\*=?|//=?|<<=?|>>=?|[=!<>+\-*/%@&|^]=|\.\.\.|[.,:;=<>+\-*/%@&|^~])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
CONSTANTS = {"None", "True", "False"}


@dataclass(frozen=True)
class Lexeme:
    """A stretch of bytes with the group of LEXEME that it matched, or `body`: the inside of a triple-quoted string."""

    group: str
    start: int
    text: str


@dataclass(frozen=True)
class Scan:
    """What each byte is and where it stands."""

    kinds: Int[np.ndarray, " bytes"]
    """Index into KINDS."""
    statements: list[str]
    """First word of the line that each byte is in, where that makes a statement, else ""."""
    depths: Int[np.ndarray, " bytes"]
    """Open brackets around each byte, since the start of the stretch [brackets]."""


def scan(data: bytes, is_cut: bool) -> Scan:
    """Read a stretch of one file; `is_cut` where it may begin inside a string."""
    text = data.decode("latin-1")  # a character a byte
    readings = [list(_lexemes(text, ""))]
    if is_cut:
        readings += [list(_lexemes(text, quote)) for quote in ('"""', "'''")]
    return _classified(min(readings, key=_oddities), len(text))


def _lexemes(text: str, inside: str) -> Iterator[Lexeme]:
    """Lexemes that cover `text` without a gap; it begins inside a string closed by `inside`, where that is not empty."""
    place = 0
    while place < len(text):
        if inside:
            closing = re.compile(rf"(?:\\.|[^\\])*?{inside}", re.DOTALL).match(text, place)
            end = closing.end() if closing else len(text)
            yield Lexeme("body", place, text[place:end])
            place, inside = end, ""
            continue
        match = LEXEME.match(text, place)
        assert match is not None, f"no lexeme at {place}: {text[place : place + 20]!r}"
        group = match.lastgroup or "other"
        yield Lexeme(group, place, match[0])
        place = match.end()
        if group == "triple":
            inside = match[0][-3:]


def _oddities(lexemes: list[Lexeme]) -> float:
    """How little this looks like a reading of Python: prose read as code, or code inside a string [oddities]."""
    odd, before = 0.0, None
    for number, lexeme in enumerate(lexemes):
        if lexeme.group == "space":
            continue
        if lexeme.group in ("broken", "other"):
            odd += 2
        elif lexeme.group == "name" and not keyword.iskeyword(lexeme.text):
            odd += before is not None and before.group == "name" and not keyword.iskeyword(before.text)
        elif lexeme.group == "body":
            odd += BEGINS_INSIDE * (number == 0) + sum(map(_is_code, lexeme.text.split("\n")))
        before = lexeme
    return odd


def _is_code(line: str) -> bool:
    """Whether a line of a string looks like a statement: as one in a docstring does, but not line after line."""
    line = line.strip()
    return bool(re.search(r"# |,$|\bself\.|\w\(.*\)$|^(def|class|import|from|if|return|for) .*|^[\w.]+ = ", line))


def _classified(lexemes: list[Lexeme], size: int) -> Scan:
    kinds, depths, statements = np.zeros(size, np.int64), np.zeros(size, np.int64), [""] * size
    depth, first, defining, is_docstring = 0, None, "", False
    solid = [number for number, lexeme in enumerate(lexemes) if lexeme.group not in ("space", "newline", "comment")]
    following = {number: lexemes[after].text for number, after in pairwise(solid)}
    before = ""
    for number, lexeme in enumerate(lexemes):
        group, text = lexeme.group, lexeme.text
        if group == "newline" and depth == 0:
            first, defining = None, ""
        elif first is None and group not in ("space", "newline", "comment"):
            first, is_docstring = text, group == "triple" or group == "body"
        if group == "close":
            depth = max(0, depth - 1)
        if group in ("triple", "body"):
            kind = "docstring" if is_docstring and depth == 0 else "string"
        else:
            kind = _kind(group, text, before, following.get(number, ""), first or "", depth, defining)
        stretch = slice(lexeme.start, lexeme.start + len(text))
        kinds[stretch], depths[stretch] = KIND[kind], min(depth, MAX_DEPTH)
        statement = first if first in STATEMENTS else ""
        statements[stretch] = [statement] * len(text)
        if group == "open":
            depth += 1
        if text in ("def", "class") and group == "name":
            defining = text
        elif text == ":" and depth == 0:
            defining = ""
        if group not in ("space", "newline", "comment"):
            before = text
    return Scan(kinds, statements, depths)


def _kind(group: str, text: str, before: str, after: str, first: str, depth: int, defining: str) -> str:
    """What a lexeme outside triple quotes is, from its neighbours, its line's first word and what is being defined."""
    simple = {
        "space": "space between words",
        "newline": "line break",
        "comment": "comment",
        "string": "string",
        "broken": "string",
        "number": "number",
        "open": "opening bracket",
        "close": "closing bracket",
    }
    if group in simple:
        return simple[group]
    if group != "name":
        return {",": "comma", ":": "colon", ".": "dot"}.get(text, "operator")
    return _name_kind(text, before, after, first, depth, defining)


def _name_kind(text: str, before: str, after: str, first: str, depth: int, defining: str) -> str:
    """What a name is."""
    if keyword.iskeyword(text) and text not in CONSTANTS:
        return "keyword"
    if before in ("def", "class"):
        return "name of a function being defined" if before == "def" else "name of a class being defined"
    if first == "@":
        return "decorator"
    if first in ("import", "from"):
        return "imported name"
    if before == ".":
        return "method being called" if after == "(" else "attribute"
    if defining == "def" and depth == 1 and before in ("(", ",", "*", "**"):
        return "parameter of a function being defined"
    if depth and after == "=" and before in ("(", ","):
        return "keyword argument"
    return "function being called" if after == "(" else "name"
