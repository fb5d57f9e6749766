import unicodedata

import numpy as np
import pytest

from everyscope.describe.explanations.offline import Ground
from everyscope.describe.explanations.rules import OneOf, Rule
from everyscope.describe.explanations.traits import TraitFamily, Traits
from everyscope.describe.explanations.wording import MAX_LABEL, SUBJECTS, UNSAFE, phrase_of, quoted, safe_label, shortened

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
    traits = Traits(families, pieces)
    for name in families:
        for other in families:
            rule = Rule(((OneOf(name, (0, 1)), OneOf(other, (1,))), (OneOf(other, (0,)),)))
            assert is_safe(phrase_of(rule, traits))


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
