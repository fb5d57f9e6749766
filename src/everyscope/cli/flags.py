"""Fields of a config as flags: --groups.0.widths 4096 16384. The one place for tyro."""

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, get_args

import tyro
from pydantic import ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema, one_line

Config = TypeVar("Config", bound=Schema)


def split_flags(words: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
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
    kind: type[Config],
    prog: str,
    fields: list[str],
    description: str | None = None,
    default: Config | None = None,
    others: Collection[str] = (),
) -> Config:
    """A config of `kind` whose fields are flags; ConfigError, in one line, for a flag or a value that it does not take.

    `others` are flags that the command takes besides: a misspelt one may have meant them.
    """
    _refuse_unknown(kind if default is None else default, prog, fields, others)
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
        raise ConfigError(f"{unboxed(complaint.getvalue())}; {_where(prog, default)}") from error


def flags_of(config: Schema | type[Schema], prefix: str = "--") -> dict[str, str]:
    """Every flag of a config, with its description; of a config without values, of its fields' types."""
    kind = config if isinstance(config, type) else type(config)
    found: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        flag, value = prefix + name.replace("_", "-"), None if isinstance(config, type) else getattr(config, name)
        parts: list[tuple[str, Schema | type[Schema]]] = []
        if isinstance(value, Schema):
            parts = [(f"{flag}.", value)]
        elif isinstance(value, tuple) and value:
            parts = [(f"{flag}.{number}.", part) for number, part in enumerate(value) if isinstance(part, Schema)]
        else:
            kinds = [field.annotation, *get_args(field.annotation)]
            parts = [(f"{flag}.", one) for one in kinds if isinstance(one, type) and issubclass(one, Schema)]
        if not parts:
            found[flag] = field.description or ""
        for start, part in parts:
            found |= flags_of(part, start)
    return found


def unboxed(box: str) -> str:
    """What tyro drew a box around, as one line: without its title, its frame, its footer and pydantic's link."""
    lines = [line.strip("│╭╮╰╯─| ") for line in box.splitlines()[1:]]
    lines = ["" if set(line) <= {"-", "+"} else line for line in lines]  # frames, where the terminal knows no others
    text = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    text = re.sub(r"\s*(\[type=[^]]*\])?\s*For further information visit \S+", "", text).rstrip(".")
    return re.sub(r"^Error parsing (\S+): \d+ validation errors? for \w+ (Value error, )?", r"\1: ", text)


def _refuse_unknown(config: Schema | type[Schema], prog: str, fields: Sequence[str], others: Collection[str]) -> None:
    known = flags_of(config)
    for word in fields:
        name = word.partition("=")[0]
        plain = re.sub(r"(^--|\.)no-", r"\1", name)
        if not word.startswith("--") or {name, plain} & known.keys() or name in ("--help", "--help-all"):
            continue
        near = _nearest(name, [*known, *others])
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"unknown flag {name}; {hint}{_where(prog, None if isinstance(config, type) else config)}")


def _nearest(flag: str, known: Sequence[str]) -> str | None:
    """The known flag nearest to a misspelt one, whole or by its last part, as --widths for --groups.0.widths."""
    inside = [one for one in known if one.startswith(f"{flag}.")]
    whole = inside or difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    by_end = {one.removeprefix("--").rpartition(".")[2]: one for one in reversed(known)}
    end = difflib.get_close_matches(flag.removeprefix("--").rpartition(".")[2], by_end, n=1, cutoff=0.6)
    return by_end[end[0]] if end else None


def _where(prog: str, default: Schema | None) -> str:
    return f"`{prog} {'--help' if default is None else '--help-all'}` lists the fields"
