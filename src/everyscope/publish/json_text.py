"""Values as JSON text in a spelling of our own: keys sorted, no spaces, chosen digits. Equal values give equal bytes anywhere."""

import json
from collections.abc import Iterable, Mapping
from functools import cache

MEASURED_DIGITS, HALF_DIGITS, ROUNDED_DIGITS = 6, 5, 4
"""Significant digits of numbers that a suite holds in full, as float16, and rounded to 11 bits."""


def literal(text: str) -> str:
    """`text` as a JSON string.

    Postgres has no NUL, so it becomes a space. Neuronpedia's importer turns each NUL that JSON spells into a space, and mistakes
    a backslash before u0000 for one, so that backslash is spelt otherwise.
    """
    return json.dumps(text.replace("\0", " "), ensure_ascii=False).replace(r"\\u0000", r"\u005cu0000")


def shortened(text: str, length: int) -> str:
    """`text`, or its beginning with an ellipsis, in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def number(value: float, digits: int) -> str:
    """A finite number with `digits` significant digits."""
    return f"{value + 0.0:.{digits}g}"  # + 0.0: there is one zero


@cache
def half(value: float) -> str:
    """A float16, with as many digits as read back as the same float16."""
    return number(value, HALF_DIGITS)


def array(texts: Iterable[str]) -> str:
    """A JSON array of values that are JSON text."""
    return f"[{','.join(texts)}]"


def numbers(values: Iterable[float], digits: int) -> str:
    """A JSON array of numbers with `digits` significant digits."""
    return array(number(value, digits) for value in values)


def integers(values: Iterable[int]) -> str:
    """A JSON array of whole numbers."""
    return array(map(str, values))


def json_object(fields: Mapping[str, str]) -> str:
    """A JSON object of fields whose values are JSON text; the names need no escaping."""
    return "{" + ",".join(f'"{name}":{fields[name]}' for name in sorted(fields)) + "}"


def encoded(value: object) -> str:
    """Any JSON value, with keys sorted and NUL treated as in `literal`."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(key)}:{encoded(item)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, list | tuple):
        return array(map(encoded, value))
    return json.dumps(value, allow_nan=False)
