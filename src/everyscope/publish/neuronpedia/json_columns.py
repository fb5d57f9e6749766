"""Columns as JSON text: a row of a file is made by Arrow out of columns of text, not by Python out of values.

Everything is one line, keys are sorted, and numbers are spelt the same on every machine: so equal suites give equal bytes.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np
import pyarrow
import pyarrow.compute as compute
from jaxtyping import Float, Int

MEASURED_DIGITS, HALF_DIGITS, ROUNDED_DIGITS = 6, 5, 4
"""Significant digits of numbers that a suite holds in full, as float16, and rounded to 11 bits."""
LARGEST_HALF = 0x7C00
"""The bits of float16's infinity: those of every finite number from 0 on are less."""


def literal(text: str) -> str:
    """`text` as a JSON string.

    Postgres has no NUL, so it becomes a space. The importer itself turns each NUL that JSON spells into a space, and mistakes a
    backslash before u0000 for one, so that backslash is spelt otherwise.
    """
    return json.dumps(text.replace("\0", " "), ensure_ascii=False).replace(r"\\u0000", r"\u005cu0000")


def literals(texts: Iterable[str]) -> pyarrow.Array:
    """A column of JSON strings."""
    return pyarrow.array([literal(text) for text in texts], pyarrow.string())


def shortened(text: str, length: int) -> str:
    """`text`, or its beginning with an ellipsis, in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def integers(values: Int[np.ndarray, " rows"]) -> pyarrow.Array:
    """Whole numbers."""
    return pyarrow.array(values, pyarrow.int64()).cast(pyarrow.string())


def numbers(values: Float[np.ndarray, " rows"], digits: int) -> pyarrow.Array:
    """Finite numbers with so many significant digits; each different one is spelt once."""
    known, places = np.unique(np.asarray(values, np.float64) + 0.0, return_inverse=True)  # + 0.0: there is one zero
    return pyarrow.array([f"{value:.{digits}g}" for value in known.tolist()], pyarrow.string()).take(pyarrow.array(places))


@cache
def half_texts() -> pyarrow.Array:
    """By its bits, each finite float16 from 0 on, with as many digits as read back as the same float16."""
    halves = np.arange(LARGEST_HALF, dtype=np.uint16).view(np.float16)
    return pyarrow.array([f"{half:.{HALF_DIGITS}g}" for half in halves.tolist()], pyarrow.string())


def halves(values: Float[np.ndarray, " rows"]) -> pyarrow.Array:
    """Values held as float16, from 0 on."""
    return half_texts().take(pyarrow.array(values.astype(np.float16, copy=False).view(np.uint16)))


def arrays(texts: pyarrow.Array, counts: Int[np.ndarray, " rows"]) -> pyarrow.Array:
    """A JSON array for each row, of its `counts` next texts."""
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(counts)]), pyarrow.int32())
    lists = pyarrow.ListArray.from_arrays(offsets, texts)
    return joined("[", compute.call_function("binary_join", [lists, pyarrow.scalar(",")]), "]")


def quoted(texts: pyarrow.Array) -> pyarrow.Array:
    """Numbers as JSON strings."""
    return joined('"', texts, '"')


def objects(fields: Mapping[str, pyarrow.Array | str]) -> pyarrow.Array:
    """A JSON object for each row; a plain string is the JSON of a field that all rows have alike."""
    parts: list[pyarrow.Array | str] = []
    for number, (name, value) in enumerate(sorted(fields.items())):
        parts += [f"{',' if number else '{'}{literal(name)}:", value]
    return joined(*parts, "}")


def joined(*parts: pyarrow.Array | str) -> pyarrow.Array:
    """The parts side by side, row by row; a plain string stands in every row."""
    merged: list[pyarrow.Array | str] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    columns = [pyarrow.scalar(part) if isinstance(part, str) else part for part in merged]
    return compute.call_function("binary_join_element_wise", [*columns, pyarrow.scalar("")])


def constant(value: object) -> str:
    """Any JSON value that all rows have alike; keys are sorted, and NUL is treated as in `literal`."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(key)}:{constant(item)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(constant(item) for item in value) + "]"
    return json.dumps(value, allow_nan=False)
