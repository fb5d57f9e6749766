"""Rules in words, and words that are safe to show: tokens and answers of language models are untrusted text."""

import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from everyscope.describe.explanations.likeness import Likeness
from everyscope.describe.explanations.rules import OneOf, Rule
from everyscope.describe.explanations.traits import Traits

MAX_LABEL = 120
"""Length of a label at most [characters]."""
MAX_PIECE = 24
"""Length at most of what is quoted of one token [characters]."""
UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that are never shown as they are: control, direction and joining characters among them."""
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
MANY_BLANKS = 3
"""From so many on, equal blanks are counted instead of repeated."""


def safe_label(text: str) -> str:
    """`text` on one line, without control characters, its backticks in pairs, at most MAX_LABEL characters."""
    text = " ".join("".join(" " if character.isspace() else character for character in text).split())
    text = "".join(_shown(character) for character in text)
    if len(text) > MAX_LABEL:
        text = text[: MAX_LABEL - 2].rstrip() + "…"
    if text.count("`") % 2:
        text = text[:-1] + "`…" if text.endswith("…") else text + "`"
    return text[:MAX_LABEL]


def _shown(character: str) -> str:
    return f"\\u{ord(character):04x}" if unicodedata.category(character) in UNSAFE else character


def quoted(piece: bytes) -> str:
    """A token between backticks, blanks made visible; its bytes in hexadecimal where they are no whole characters."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"`⟨{piece[:8].hex(' ').upper()}⟩`"
    if not text:
        return "`∅`"
    shown, place = "", 0
    while place < len(text) and len(shown) <= MAX_PIECE:
        run = len(text[place:]) - len(text[place:].lstrip(text[place])) if text[place] in BLANKS else 1
        blank = BLANKS.get(text[place])
        if blank is None:
            shown += "ˋ" if text[place] == "`" else _shown(text[place])
        else:
            shown += f"{blank}×{run}" if run >= MANY_BLANKS else blank * run
        place += run
    return f"`{shown[:MAX_PIECE]}…`" if place < len(text) or len(shown) > MAX_PIECE else f"`{shown}`"


def listed(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def phrase_of(rule: Rule | Likeness, traits: Traits) -> str:
    """A rule as a label."""
    return safe_label(_likeness(rule, traits) if isinstance(rule, Likeness) else _spelt(rule, traits))


def tokens_with_shares(rule: Rule, shares: Sequence[float], traits: Traits) -> str:
    """The tokens of a rule of one set of them, each with the share of its occurrences on which a latent fires."""
    ((test,),) = rule.alternatives
    named = [_token(key, traits.pieces) for key in _keys(test, traits)]
    percents = ["<1" if share < 0.005 else f"{100 * share:.0f}" for share in shares]
    return safe_label(", ".join(f"{token} {percent} %" for token, percent in zip(named, percents, strict=True)))


def shortened(rule: Rule, traits: Traits) -> Rule:
    """The rule without the last values of its longest sets, as many as it takes for its label to say all that it tests."""
    while len(_spelt(rule, traits)) > MAX_LABEL:
        sets = [test for tests in rule.alternatives for test in tests]
        longest = max(sets, key=lambda test: len(test.values))
        if len(longest.values) == 1:
            break
        cut = replace(longest, values=longest.values[:-1])
        rule = Rule(tuple(tuple(cut if test is longest else test for test in tests) for tests in rule.alternatives))
    return rule


def _spelt(rule: Rule, traits: Traits) -> str:
    return ", or ".join(_conjunction(tests, traits) for tests in rule.alternatives)


def _likeness(rule: Likeness, traits: Traits) -> str:
    """A rule of likeness by the tokens that it names, the token itself before the other parts; fewer where they are long."""
    named = {part: _distinct(rule.named[part], traits) for part in sorted(rule.named, key=lambda part: part != "own")}
    count = max(map(len, named.values()))
    while True:
        parts = [LIKENESS[part].format(listed(words[:count])) for part, words in named.items() if words]
        if count == 1 or len(", ".join(parts)) <= MAX_LABEL:
            return ", ".join(parts)
        count -= 1


def _distinct(tokens: Sequence[int], traits: Traits) -> list[str]:
    """Quoted, one of those that differ in case or spacing alone."""
    kept: dict[str, str] = {}
    for token in tokens:
        kept.setdefault(traits.pieces[token].decode("utf-8", "replace").strip().lower(), quoted(traits.pieces[token]))
    return list(kept.values())


LIKENESS = {
    "own": "tokens like {}",
    "before": "after tokens like {}",
    "after": "before tokens like {}",
    "near": "in text with {}",
}
"""How each part of a rule of likeness is said."""
LIKE_SUBJECTS = {"own": "word class", "before": "context", "after": "context", "near": "topic"}
"""What each part is about."""


def kind_of(rule: Rule | Likeness) -> str:
    """What a rule is about, in a word: token, word class, context, topic, syntax, position, or mixed."""
    if isinstance(rule, Likeness):
        kinds = {LIKE_SUBJECTS[part] for part in rule.parts}
    else:
        kinds = {SUBJECTS[test.family] for tests in rule.alternatives for test in tests}
    return kinds.pop() if len(kinds) == 1 else "mixed"


SUBJECTS = {
    "token": "token",
    "stripped": "token",
    "shape": "token",
    "word": "token",
    "identifier": "token",
    "class": "word class",
    "use": "word class",
    "meaning": "word class",
    "ending": "word class",
    "place in word": "word class",
    "topic": "topic",
    "subject": "topic",
    **dict.fromkeys(
        (f"{side} {what}" for side in ("previous", "next") for what in ("word", "class", "use", "meaning")), "context"
    ),
    "pair": "context",
    "previous": "context",
    "two before": "context",
    "next": "context",
    "repeat": "context",
    "kind": "syntax",
    "statement": "syntax",
    "depth": "syntax",
    "position": "position",
    "place in line": "position",
    "place in sentence": "position",
}
"""What each family is about."""


def _conjunction(tests: tuple[OneOf, ...], traits: Traits) -> str:
    nouns = [NOUNS[test.family](_keys(test, traits), traits.pieces) for test in tests if test.family in NOUNS]
    rest = [QUALIFIERS[test.family](_keys(test, traits), traits.pieces) for test in tests if test.family in QUALIFIERS]
    subject = [f"{nouns[0]} ({', '.join(nouns[1:])})"] if len(nouns) > 1 else nouns
    return " ".join([*subject, *rest])


def _keys(test: OneOf, traits: Traits) -> list[Any]:
    return [traits.families[test.family].keys[value] for value in test.values]


def _token(key: Hashable, pieces: list[bytes]) -> str:
    """A token by id; what frames a text has no bytes."""
    return quoted(pieces[key]) if isinstance(key, int) and 0 <= key < len(pieces) and pieces[key] else "the start of a text"


def _pairs(keys: list[tuple[int, int]], pieces: list[bytes]) -> str:
    """Pairs of tokens, those after the same token together."""
    after: dict[int, list[int]] = {}
    for before, token in keys:
        after.setdefault(before, []).append(token)
    firsts: dict[tuple[int, ...], list[int]] = {}
    for before, tokens in after.items():
        firsts.setdefault(tuple(sorted(tokens)), []).append(before)
    return ", or ".join(
        f"{listed([_token(token, pieces) for token in tokens])} after {listed([_token(before, pieces) for before in befores])}"
        for tokens, befores in firsts.items()
    )


def _following(keys: list[Any], pieces: list[bytes]) -> str:
    words = [quoted(pieces[key]) if key >= 0 and pieces[key] else "the end of a text" for key in keys]
    return f"before {listed(words)}"


def _two_before(keys: list[Any], pieces: list[bytes]) -> str:
    def named(pair: tuple[int, int]) -> str:
        joined = b"".join(pieces[token] for token in pair if token >= 0)
        return quoted(joined) if joined else "the start of a text"

    return f"after {listed([named(pair) for pair in keys])}"


def _statements(keys: list[Any], pieces: list[bytes]) -> str:
    named = [f"`{key}`" for key in keys if key]
    parts = [f"in a line that begins with {listed(named)}"] if named else []
    return " or ".join(parts + (["in a line that is no statement of its own"] if "" in keys else []))


def _word(keys: list[Any], pieces: list[bytes]) -> str:
    """Words whatever the case and the tokens that they are cut into."""
    words = [quoted(key.encode()) for key in keys if key]
    parts = [f"the word {listed(words)}" if any(key[:1].isalpha() for key in keys) else listed(words)] if words else []
    return " or ".join(parts + (["white space"] if "" in keys else []))


def _beside(preposition: str) -> "Phrase":
    def phrase(keys: list[Any], pieces: list[bytes]) -> str:
        words = [quoted(key.encode()) for key in keys if key]
        return f"{preposition} {listed(words + (['no word'] if '' in keys else []))}"

    return phrase


def _group(one: str, rare: str, preposition: str = "") -> "Phrase":
    """Groups of words, each by those that stand for it."""

    def phrase(keys: list[Any], pieces: list[bytes]) -> str:
        named = [", ".join(quoted(word.encode()) for word in key) for key in keys if key]
        parts = [f"{one} {'; '.join(named)}"] if named else []
        return preposition + " or ".join(parts + ([rare] if () in keys else []))

    return phrase


def _classes(preposition: str) -> "Phrase":
    return lambda keys, pieces: f"{preposition} {listed(keys)}"


Phrase = Callable[[list[Any], list[bytes]], str]
NOUNS: dict[str, Phrase] = {
    "token": lambda keys, pieces: listed([_token(key, pieces) for key in keys]),
    "stripped": lambda keys, pieces: f"{listed([quoted(key.encode()) if key else 'white space' for key in keys])} (any spacing)",
    "word": _word,
    "identifier": lambda keys, pieces: (
        f"in the name {listed([quoted(key.encode()) for key in keys if key])}" if any(keys) else "no name"
    ),
    "class": lambda keys, pieces: listed(keys),
    "ending": lambda keys, pieces: listed(keys),
    "use": _group("words used like", "a rare word"),
    "meaning": _group("words like", "a rare word"),
    "pair": _pairs,
    "shape": lambda keys, pieces: listed(keys),
    "kind": lambda keys, pieces: listed(keys),
}
"""Families that name a token: (keys, pieces) to words."""
QUALIFIERS: dict[str, Phrase] = {
    "previous": lambda keys, pieces: f"after {listed([_token(key, pieces) for key in keys])}",
    "two before": _two_before,
    "next": _following,
    "statement": _statements,
    "place in line": lambda keys, pieces: f"as {listed(keys)}",
    "depth": lambda keys, pieces: f"within {keys[0]} open brackets" if keys[0] else "outside brackets",
    "position": lambda keys, pieces: f"at positions {keys[0]} to {max(2 * keys[0] - 1, keys[0])} of the text read",
    "repeat": lambda keys, pieces: listed(keys),
    "previous word": _beside("after"),
    "next word": _beside("before"),
    "previous class": _classes("after"),
    "next class": _classes("before"),
    "previous use": _group("words used like", "a rare word", "after "),
    "next use": _group("words used like", "a rare word", "before "),
    "previous meaning": _group("words like", "a rare word", "after "),
    "next meaning": _group("words like", "a rare word", "before "),
    "place in word": lambda keys, pieces: f"as {listed(keys)}",
    "place in sentence": lambda keys, pieces: f"as {listed(keys)}",
    "topic": _group("near", "where words are rare"),
    "subject": _group("in texts about", "in texts of rare words"),
}
"""Families that say where a token stands."""
