import numpy as np
import pytest

from everyscope.describe.explanations.offline import Ground
from everyscope.describe.explanations.passages import Background, Passages
from everyscope.describe.explanations.prompts import (
    DETECT,
    FUZZ,
    excerpt,
    explain_messages,
    judge_messages,
    parse_label,
    parse_numbers,
)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ('{"numbers": [1, 3]}', {1, 3}),
        ('{"numbers": []}', set()),
        ('```json\n{"numbers": [2]}\n```', {2}),
        ('{"numbers": [0]}', None),
        ('{"numbers": [6]}', None),
        ('{"numbers": [true]}', None),
        ('{"numbers": [1.0]}', None),
        ('{"numbers": "1"}', None),
        ('{"numbers": [1], "why": "x"}', None),
        ("[1, 2]", None),
        ("Excerpts 1 and 2.", None),
        ('{"numbers": [1]', None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_numbers_are_read_strictly(answer: str, numbers: set[int] | None):
    assert parse_numbers(answer, 5) == numbers


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"label": "names of functions"}', "names of functions"),
        ('{"label": "a\\u0000b\\nc"}', "a\\u0000b c"),
        ('{"label": ""}', None),
        ('{"label": 3}', None),
        ('{"label": "x", "more": 1}', None),
        ("names of functions", None),
        ("null", None),
    ],
)
def test_labels_are_read_strictly(answer: str, label: str | None):
    assert parse_label(answer) == label


def test_marks_cannot_be_forged():
    pieces = [b"", b"a <", b"< b >", b"> c", b"\n\x1b"]
    ids, mask = np.array([[0, 1, 2, 3, 4]]), np.ones((1, 5), bool)
    background = Background(ids, np.zeros((1, 5), int), mask)
    passages = Passages(ids, np.zeros((1, 5), int), mask, np.array([0]), background)
    inside = np.arange(5)
    assert excerpt(passages, pieces, inside) == "a < < b > > c⏎�"
    assert excerpt(passages, pieces, inside, np.array([3])) == "a < < b ><<> c>>⏎�"
    assert excerpt(passages, pieces, inside, np.array([1, 2])).count("<<") == 1


def test_neighbouring_marks_are_one(ground: Ground):
    inside = ground.score.tokens(0)
    text = excerpt(ground.passages, ground.traits.pieces, inside, inside[2:5])
    assert text.count("<<") == text.count(">>") == 1
    assert "\n" not in text
    assert excerpt(ground.passages, ground.traits.pieces, inside) == text.replace("<<", "").replace(">>", "")


def test_questions_hold_what_is_asked():
    (system, user) = judge_messages(DETECT, "colons {x}", ["a", "b"])
    assert "colons {x}" in system["content"]
    assert user["content"] == "1. a\n2. b"
    assert '{"numbers": [' in system["content"]
    assert '{"numbers": [' in judge_messages(FUZZ, "x", ["a"])[0]["content"]
    assert '{"label": ' in explain_messages(["a"])[0]["content"]
