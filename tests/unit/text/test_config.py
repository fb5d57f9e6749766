"""Laws of TextConfig: fields that do not fit one another are refused by name, and no setting is ignored."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from everyscope.text.config import TextConfig


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"source": "files"}, "paths"),
        ({"source": "standard_library", "paths": ("a.txt",)}, "paths"),
        ({"source": "dataset"}, "dataset=None"),
        ({"source": "files", "paths": ("a.txt",), "dataset": "x/y"}, "dataset='x/y'"),
        ({"source": "standard_library", "dataset_config": "en"}, "dataset_config='en'"),
        ({"source": "files", "paths": ("a.txt",), "dataset_split": "test"}, "dataset_split='test'"),
        ({"source": "standard_library", "column": "body"}, "column='body'"),
        ({"context": 3}, "context"),
        ({"held_out_fraction": 0.0}, "held_out_fraction"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"source": "the_internet"}, "source"),
    ],
)
def test_what_does_not_fit_is_named(fields, named):
    with pytest.raises(ValidationError, match=named):
        TextConfig(**fields)


@pytest.mark.parametrize(
    ("config", "origin"),
    [
        (TextConfig(), "standard_library"),
        (TextConfig(source="files", paths=(Path("a.txt"), Path("b"))), "a.txt, b"),
        (TextConfig(source="dataset", dataset="x/y", column="body"), "dataset x/y"),
    ],
)
def test_the_origin_in_words(config, origin):
    assert config.origin == origin
