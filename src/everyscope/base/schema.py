"""The base of every config: frozen, strict about unknown fields, and able to say exactly what it holds.

A config does no I/O and no randomness when built, so that it can be resolved, printed, hashed and compared anywhere.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

LONGEST_SHOWN = 80
"""A wrong value is repeated in its error up to this length [characters]."""


class Schema(BaseModel):
    """A frozen pydantic model that refuses unknown fields and takes each field's docstring as its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def as_json(self) -> dict[str, Any]:
        """The resolved config as plain JSON values (paths as strings), in field order."""
        return self.model_dump(mode="json")


def one_line(error: ValidationError) -> str:
    """What pydantic found wrong, in one line: field, problem, and what was given where that is short."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    given = first["input"]
    if not isinstance(given, dict | BaseModel) and len(repr(given)) <= LONGEST_SHOWN:  # a cross-field rule gets the whole config
        message += f", got {given!r}"
    return f"{field}: {message}{more}" if field else message + more
