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
        ({"source": "files", "paths": ("a.txt",), "dataset_revision": "v1"}, "dataset_revision='v1'"),
        ({"roles": ("user",)}, r"roles=\('user',\) with source='standard_library': only source=\"files\" and"),
        ({"shuffle_seed": 0}, "shuffle_seed=0"),
        ({"source": "files", "paths": ("a.jsonl",), "roles": ()}, r"roles=\(\): no token would count"),
        ({"context": 8, "skip_positions": 7}, "skip_positions=7 leaves nothing to measure of context=8; set it to at most 6"),
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


def test_a_record_without_later_fields_is_read_and_written_as_it_was():
    record = TextConfig().as_json()
    assert not {"dataset_revision", "roles", "shuffle_seed", "bos", "skip_positions"} & record.keys()
    assert TextConfig.model_validate(record) == TextConfig()
    changed = TextConfig(source="files", paths=(Path("a"),), bos="document", skip_positions=2, shuffle_seed=0, roles=("user",))
    assert TextConfig.model_validate(changed.as_json()) == changed
    assert {"bos", "skip_positions", "shuffle_seed", "roles"} <= changed.as_json().keys()


def test_another_corpus_is_cut_alike():
    text = TextConfig(
        source="files", paths=(Path("a"),), context=64, prefix="x", bos="document", skip_positions=2, shuffle_seed=0
    )
    other = TextConfig(source="arithmetic", **text.packing)
    assert (other.context, other.prefix, other.bos, other.skip_positions) == (64, "x", "document", 2)
