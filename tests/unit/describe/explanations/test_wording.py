import unicodedata

import numpy as np
import pytest

from everyscope.describe.explanations.likeness import ALONE, MOST_PARTS, NAMED, Likeness
from everyscope.describe.explanations.offline import Ground
from everyscope.describe.explanations.rules import OneOf, Rule
from everyscope.describe.explanations.space import PARTS, Space
from everyscope.describe.explanations.traits import TraitFamily, Traits
from everyscope.describe.explanations.wording import (
    MAX_LABEL,
    SUBJECTS,
    UNSAFE,
    kind_of,
    phrase_of,
    quoted,
    safe_label,
    shortened,
)

HOSTILE = [
    b"<script>alert(1)</script>",
    b"\x00\x1b[31m\x07",
    b"\xe2\x80",
    b"`",
    b"``` `",
    "\u202e\u2066\u200b".encode(),
    b"x" * 10_000,
    b"\n" * 50 + b" " * 50,
    "\u2028\u2029\ufeff".encode(),
    b"\"'",
    b"",
    "\U000e0041".encode(),
    "é̂̃".encode(),
]


NOWHERE = Space(np.zeros(0, np.int64), np.zeros((1, 0)), {}, np.zeros((0, 0)), np.zeros(1))


def likeness(named: dict[str, tuple[int, ...]]) -> Likeness:
    """A rule of likeness that names these tokens."""
    return Likeness(tuple(named), np.zeros(0), 0.0, named)


def is_safe(label: str) -> bool:
    return (
        0 < len(label) <= MAX_LABEL
        and label.count("`") % 2 == 0
        and not any(unicodedata.category(character) in UNSAFE for character in label)
        and "\n" not in label
    )


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_tokens_give_safe_labels(piece: bytes):
    assert is_safe(quoted(piece))
    pieces = [piece, b"other", piece + b"`"]
    values = np.zeros(4, np.int32)
    families = {
        "token": TraitFamily("token", values, (0, 1, 2), 5),
        "pair": TraitFamily("pair", values, ((0, 1), (2, 0)), 5),
        "word": TraitFamily("word", values, (piece.decode("utf-8", "replace"), "b"), 5),
        "stripped": TraitFamily("stripped", values, (piece.decode("utf-8", "replace").strip(), "b"), 5),
        "two before": TraitFamily("two before", values, ((0, 2), (1, 0)), 5),
        "next": TraitFamily("next", values, (0, -1), 5),
    }
    traits = Traits(families, pieces, NOWHERE)
    for name in families:
        for other in families:
            rule = Rule(((OneOf(name, (0, 1)), OneOf(other, (1,))), (OneOf(other, (0,)),)))
            assert is_safe(phrase_of(rule, traits))
    for parts in (PARTS, ("near",), ("before", "own")):
        assert is_safe(phrase_of(likeness(dict.fromkeys(parts, (0, 1, 2))), traits))


def test_a_rule_of_likeness_in_words(ground: Ground):
    """The token itself first, the other parts by weight; tokens that differ in case or spacing alone once; few enough to read."""
    by_text = {piece: token for token, piece in enumerate(ground.traits.pieces)}
    one, spaced, other = (by_text[piece] for piece in (b"self", b" self", b"return"))
    both = likeness({"before": (other,), "own": (one, spaced, other)})
    assert phrase_of(both, ground.traits) == "tokens like `self` or `return`, after tokens like `return`"
    assert kind_of(both) == "mixed"
    alone = likeness({"near": (other,)})
    assert phrase_of(alone, ground.traits) == "in text with `return`"
    assert kind_of(alone) == "topic"
    assert max(sum(sorted(NAMED.values())[-MOST_PARTS:]), ALONE) <= 8
    long = sorted(by_text.values(), key=lambda token: -len(ground.traits.pieces[token]))[:8]
    cut = phrase_of(likeness({"own": tuple(long[:3]), "before": tuple(long[3:5]), "near": tuple(long[5:])}), ground.traits)
    assert is_safe(cut)
    assert "after" in cut
    assert "in text" in cut


ANSWERS = [*(piece.decode("utf-8", "replace") for piece in HOSTILE), "a`b", "` " * 100, "a\tb\r\nc"]


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_of_language_models_are_made_safe(text: str):
    label = safe_label(text)
    assert not label or is_safe(label)


def test_blanks_are_visible():
    assert quoted(b" self") == "`␣self`"
    assert quoted(b"\n        ") == "`⏎␣×8`"
    assert quoted(b"\xe2\x80") == "`⟨E2 80⟩`"


def test_every_family_can_be_worded(ground: Ground):
    traits = ground.traits
    assert set(traits.families) <= set(SUBJECTS)
    for name, family in traits.families.items():
        values = range(0, len(family.keys), max(1, len(family.keys) // 200))
        for value in values:
            assert is_safe(phrase_of(Rule(((OneOf(name, (value,)),),)), traits))


def test_a_long_rule_is_cut_with_its_label(ground: Ground):
    """What a label does not say, its rule does not test."""
    long = Rule(((OneOf("word", tuple(range(1, 30))), OneOf("previous", tuple(range(1, 30)))),))
    short = shortened(long, ground.traits)
    assert "…" not in phrase_of(short, ground.traits) or any("…" in quoted(piece) for piece in ground.traits.pieces)
    assert sum(len(test.values) for tests in short.alternatives for test in tests) < 58
    small = Rule(((OneOf("token", (1, 2)),),))
    assert shortened(small, ground.traits) == small
