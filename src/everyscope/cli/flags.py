"""Words of a command line: which config they are for, and that config made of them."""

import contextlib
import io
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import tyro
from pydantic import ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema, one_line

Config = TypeVar("Config", bound=Schema)


def divided(words: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """The flags of `names` (fields, with underscores) with their values, and all others: two configs share a command line.

    A flag is --name, --no-name, --name=value or --name.part; words that follow it go with it.
    """
    named: list[str] = []
    others: list[str] = []
    taking = others
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")
            taking = named if name in names or name.removeprefix("no_") in names else others
        taking.append(word)
    return named, others


def parse_fields(
    kind: type[Config], prog: str, fields: list[str], description: str | None = None, default: Config | None = None
) -> Config:
    """A config of `kind` whose fields are flags; ConfigError, in one line, for a flag or a value that it does not take."""
    complaint = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=fields, prog=prog, description=description, **given)
    except ValidationError as error:
        raise ConfigError(one_line(error)) from error
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(f"{unboxed(complaint.getvalue())}; `{prog} --help` lists the fields") from error


def unboxed(box: str) -> str:
    """What tyro drew a box around, as one line: without its title, its frame, its footer and pydantic's link."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(itertools.takewhile(bool, lines))
    return re.sub(r"\s*(\[type=[^]]*\])?\s*For further information visit \S+", "", text).rstrip(".")
