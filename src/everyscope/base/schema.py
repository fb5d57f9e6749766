"""The base of every config: frozen, strict about unknown fields, and able to say exactly what it holds.

A config does no I/O and no randomness when built, so that it can be resolved, printed, hashed and compared anywhere.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Schema(BaseModel):
    """A frozen pydantic model that refuses unknown fields and takes each field's docstring as its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def as_json(self) -> dict[str, Any]:
        """The resolved config as plain JSON values (paths as strings), in field order."""
        return self.model_dump(mode="json")


def one_line(error: ValidationError) -> str:
    """What pydantic found wrong, in one line: field, problem, what was given."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or error.title
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}, got {first['input']!r}{more}"
