import json

import numpy as np
import pytest

from everyscope.publish.json_text import array, encoded, half, integers, json_object, literal, number, numbers, shortened


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
    spelt = [json.loads(half(value)) for value in finite.tolist()]
    np.testing.assert_array_equal(np.array(spelt, np.float64).astype(np.float16), finite)
    assert [half(value) for value in (0.0, 1.5, 65504.0)] == ["0", "1.5", "65504"]


@pytest.mark.parametrize("digits", [4, 6])
def test_numbers_keep_their_digits_and_have_one_zero(digits: int):
    values = [0.0, -0.0, 1e-7, -123.456789, 0.1, 98765.4321, 1e30, 0.1]
    spelt = [number(value, digits) for value in values]
    assert spelt[0] == spelt[1] == "0"
    np.testing.assert_allclose([json.loads(text) for text in spelt], values, rtol=0.5 * 10.0 ** (1 - digits))
    assert json.loads(numbers(values, digits)) == [json.loads(text) for text in spelt]


def test_objects_have_sorted_keys():
    fields = {"z": "1", "a": literal('y"'), "m": encoded({"q": None, "b": [True, "\0"]})}
    assert json_object(fields) == r'{"a":"y\"","m":{"b":[true," "],"q":null},"z":1}'
    assert array([]) == integers([]) == "[]"
    assert integers([1, 23]) == array(["1", "23"]) == "[1,23]"


def test_shortened_keeps_the_length():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "ab…"
