import json
import sys
from itertools import pairwise

import numpy as np
import pytest

from everyscope.base.errors import TextError
from everyscope.evaluate.comparisons.labels import (
    NO_LABEL,
    PYTHON_CLASSES,
    labelled_python,
    python_labels,
    read_labelled,
    token_labels,
)
from everyscope.text.config import TextConfig

SOURCE = '''"""Says
what."""
class Größe(A):  # a note
    """Of it."""
    x = 'äb' + "c" * 10
    def f(self, y=[1,
                   2]):
        """Does."""
        return not self

async def g(): return f"a{x}b"
"docstring of nothing"
'''


def spelled(source: str) -> list[tuple[str, str]]:
    """Runs of characters with one label, and the label; those without are left out."""
    labels = python_labels(source)
    assert labels is not None
    assert len(labels) == len(source)
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(source)]
    return [(source[a:b], PYTHON_CLASSES[labels[a]]) for a, b in pairwise(edges) if labels[a] != NO_LABEL]


def test_every_class_of_a_source():
    found = spelled(SOURCE)
    of = {name: [text for text, its in found if its == name] for name in PYTHON_CLASSES}
    assert of["docstring"] == ['"""Says\nwhat."""', '"""Of it."""', '"""Does."""']
    assert of["keyword"] == ["class", "def", "return", "not", "async", "def", "return"]
    assert of["comment"] == ["# a note"]
    assert of["number"] == ["10", "1", "2"]
    assert "'äb'" in of["string"]
    assert '"docstring of nothing"' in of["string"]
    assert {"Größe", "A", "x", "self", "f", "y"} <= set(of["name"])
    assert of["indentation"] == ["    ", "    ", "    ", " " * 19, " " * 8, " " * 8]
    assert {"(", "):", "=", "+", "*"} <= set(of["operator"])


def test_f_strings_are_strings_whatever_python_makes_of_them():
    labels = python_labels('y = f"a{x}b"\n')
    kinds = {PYTHON_CLASSES[label] for label in labels[4:7]} | {PYTHON_CLASSES[label] for label in labels[10:12]}
    assert kinds == {"string"}
    assert PYTHON_CLASSES[labels[8]] == ("name" if sys.version_info >= (3, 12) else "string")


@pytest.mark.parametrize("source", ["def f(:\n", "x = 'open\n", "a\r\nb = 1\r\n", "\0"])
def test_what_cannot_be_parsed_has_no_labels(source: str):
    assert python_labels(source) is None


def test_labels_are_of_the_right_characters_in_the_whole_library():
    corpus, seen = labelled_python(TextConfig()), 0
    for document in corpus.documents():
        labels = corpus.label(document)
        if labels is None:
            continue
        characters = np.array(list(document.text))
        assert len(labels) == len(characters)
        of = {name: characters[labels == number] for number, name in enumerate(corpus.names)}
        assert all(character.isalpha() for character in of["keyword"])
        assert all(character in " \t" for character in of["indentation"])
        assert not any(character.isspace() for name in ("name", "number", "operator") for character in of[name])
        assert all(character.isspace() or character == "\\" for character in characters[labels == NO_LABEL])
        seen += 1
        if seen == 12:
            return
    pytest.fail("the library has fewer than 12 sources")


def test_tokens_take_the_label_of_most_of_their_characters():
    text = "  ab# "
    labels = np.array([0, 0, 1, 1, 2, NO_LABEL])
    spans = [(0, 2), (1, 3), (0, 6), (3, 5), (5, 6), (2, 2)]
    assert token_labels(text, labels, spans).tolist() == [0, 1, 1, 1, NO_LABEL, NO_LABEL]


def test_labels_of_ones_own(tmp_path):
    rows = [{"text": "abc", "labels": ["x", None, "y"]}, {"text": "d", "labels": ["y"]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    corpus = read_labelled(path)
    assert corpus.names == ("x", "y")
    assert [(document.text, corpus.label(document).tolist()) for document in corpus.documents()] == [
        ("abc", [0, NO_LABEL, 1]),
        ("d", [1]),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "abc", "labels": ["x"]}', "a.jsonl:1: labels must be a list with one name or null for each character"),
        ('{"text": "abc"}', "a.jsonl:1: expected a JSON object with text and labels"),
        ('{"text": "a", "labels": [1]}', "one name or null"),
        ("no json", "a.jsonl:1"),
        ('{"text": "a", "labels": [null]}', "holds no label"),
        ("", "holds no label"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(TextError, match=words.replace(".", r"\.")) as caught:
        read_labelled(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(TextError, match="cannot be read"):
        read_labelled(tmp_path / "missing.jsonl")
