"""Laws of the errors tree: one root, one line each, the extra's install command, and the tree as drawn."""

import re

import pytest

from everyscope.base import errors
from everyscope.base.errors import DataError, EveryscopeError, MissingExtra, first_line
from everyscope.base.extras import import_extra


def test_the_tree_is_drawn_as_it_is():
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    drawn = re.findall(r"^ *[│├└─ ]*([A-Z]\w+)", errors.__doc__.split("Each message")[0], flags=re.M)
    assert set(classes) <= set(drawn)
    assert all(issubclass(value, EveryscopeError) for value in classes.values())
    assert {name for name, value in classes.items() if value.__base__ is DataError} == {
        "DamagedData",
        "ShapeMismatch",
        "NonFinite",
    }


def test_a_missing_extra_names_the_pip_command():
    with pytest.raises(MissingExtra) as caught:
        import_extra("no_such_package_here", "data", "Reading text")
    message = str(caught.value)
    assert "Reading text" in message
    assert "no_such_package_here" in message
    assert "pip install 'everyscope[data]'" in message


def test_an_extra_that_is_there_is_imported():
    assert import_extra("json", "data", "Reading text").loads("1") == 1


@pytest.mark.parametrize(("error", "line"), [(OSError(), "OSError"), (ValueError("\na\nb"), "a"), (ValueError("one"), "one")])
def test_first_line_always_says_something(error, line):
    assert first_line(error) == line
