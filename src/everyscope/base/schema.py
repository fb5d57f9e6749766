"""The base of every config: frozen, strict about unknown fields, and able to say exactly what it holds.

A config does no I/O and no randomness when built, so that it can be resolved, printed, hashed and compared anywhere.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A frozen pydantic model that refuses unknown fields and takes each field's docstring as its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def as_json(self) -> dict[str, Any]:
        """The resolved config as plain JSON values (paths as strings), in field order."""
        return self.model_dump(mode="json")
