import json

import numpy as np
import pyarrow
import pytest

from everyscope.publish.neuronpedia.json_columns import (
    arrays,
    constant,
    half_texts,
    halves,
    integers,
    literal,
    literals,
    numbers,
    objects,
    shortened,
)


def imported(line: str) -> object:
    """What Neuronpedia's importer makes of a line: it first turns whatever looks like an escaped NUL into a space."""
    return json.loads(line.replace("\\u0000", " "))


@pytest.mark.parametrize(
    "text", ["", "é—", '"', "\\", "\n\t\r", "\\u0000", "\\\\u0000", "a\\\\\\u0000b", "\u2028", "\x7f", "\x1b[31m", "\ufffd", "𝒳"]
)
def test_a_literal_survives_the_importer(text: str):
    assert imported(literal(text)) == text
    assert "\n" not in literal(text)


def test_nul_becomes_a_space():
    assert imported(literal("a\0b\0")) == json.loads(literal("a\0b\0")) == "a b "


def test_every_half_reads_back_as_itself():
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    spelt = [json.loads(text) for text in half_texts().to_pylist()]
    np.testing.assert_array_equal(np.array(spelt, np.float64).astype(np.float16), finite)
    assert halves(np.array([0, 1.5, 65504], np.float16)).to_pylist() == ["0", "1.5", "65504"]


@pytest.mark.parametrize("digits", [4, 6])
def test_numbers_keep_their_digits_and_have_one_zero(digits: int):
    values = np.array([0.0, -0.0, 1e-7, -123.456789, 0.1, 98765.4321, 1e30, 0.1])
    spelt = numbers(values, digits).to_pylist()
    assert spelt[0] == spelt[1] == "0"
    np.testing.assert_allclose([json.loads(text) for text in spelt], values, rtol=0.5 * 10.0 ** (1 - digits))


def test_rows_are_objects_with_sorted_keys():
    rows = objects({"z": integers(np.array([1, 2])), "a": literals(["x", 'y"']), "m": constant({"q": None, "b": [True, "\0"]})})
    assert rows.to_pylist()[0] == '{"a":"x","m":{"b":[true," "],"q":null},"z":1}'
    assert json.loads(rows.to_pylist()[1]) == {"a": 'y"', "m": {"b": [True, " "], "q": None}, "z": 2}


def test_arrays_take_as_many_as_each_row_counts():
    texts = pyarrow.array(["1", "2", "3"], pyarrow.string())
    assert arrays(texts, np.array([0, 2, 0, 1])).to_pylist() == ["[]", "[1,2]", "[]", "[3]"]
    assert arrays(texts.slice(0, 0), np.array([0, 0])).to_pylist() == ["[]", "[]"]


def test_shortened_keeps_the_length():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "ab…"
