"""Laws of Schema: frozen, strict, and its docstrings are its descriptions."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from everyscope.base.bundled import BUNDLED_FOLDER, model_location
from everyscope.base.schema import Schema


class Recipe(Schema):
    """A test's recipe."""

    steps: int = 3
    """Length [steps]."""
    out: Path = Path("runs")
    """Where it goes."""


def test_a_field_cannot_be_changed_or_invented():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().steps = 4
    with pytest.raises(ValidationError, match="step_count"):
        Recipe(step_count=4)  # pyright: ignore[reportCallIssue]


def test_docstrings_are_descriptions():
    assert Recipe.model_fields["steps"].description == "Length [steps]."


def test_json_round_trip():
    recipe = Recipe(steps=5, out=Path("a/b"))
    assert Recipe.model_validate(json.loads(json.dumps(recipe.as_json()))) == recipe
    assert list(recipe.as_json()) == ["steps", "out"]


def test_bundled_models_have_a_folder_and_others_keep_their_name():
    assert model_location("tiny") == str(BUNDLED_FOLDER / "tiny")
    assert model_location("google/gemma-2-2b") == "google/gemma-2-2b"
