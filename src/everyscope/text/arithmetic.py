"""Generated arithmetic: text whose every answer can be worked out, and that no library's sources resemble.

Only `Random.random()` is used, for of all of Python's generators it alone promises the same numbers in every version.
"""

from random import Random

PAGES = 2**16
"""Pages there are [documents]: some 40 MB of text, made as they are read."""
PAGE_LINES = 32
"""Problems on a page [lines]."""
LARGEST_DIGITS = 3
"""Digits of the largest number in a problem."""


def arithmetic_page(number: int) -> str:
    """Page `number`: sums, differences, products, quotients with remainder and comparisons, each with its right answer."""
    random = Random(number)
    return "\n".join(PROBLEMS[_below(random, len(PROBLEMS))](random) for _ in range(PAGE_LINES)) + "\n"


def _below(random: Random, stop: int) -> int:
    return int(random.random() * stop)


def _number(random: Random, lowest: int = 0) -> int:
    """A number of one to LARGEST_DIGITS digits, each length as likely as the others."""
    stop = 10 ** (1 + _below(random, LARGEST_DIGITS))
    return lowest + _below(random, stop - lowest)


def _sum(random: Random) -> str:
    a, b = _number(random), _number(random)
    return f"{a} + {b} = {a + b}"


def _difference(random: Random) -> str:
    a, b = _number(random), _number(random)
    return f"{a} - {b} = {a - b}"


def _product(random: Random) -> str:
    a, b = _number(random), _number(random)
    return f"{a} * {b} = {a * b}"


def _quotient(random: Random) -> str:
    a, b = _number(random), _number(random, lowest=1)
    return f"{a} / {b} = {a // b} remainder {a % b}"


def _comparison(random: Random) -> str:
    a, b = _number(random), _number(random)
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


PROBLEMS = (_sum, _difference, _product, _quotient, _comparison)
"""The kinds of problems."""
