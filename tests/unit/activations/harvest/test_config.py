from pathlib import Path

import pytest
from pydantic import ValidationError

from everyscope.activations.harvest.config import HarvestConfig, ImportConfig
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig

FIELDS = {"model": ModelConfig(), "text": TextConfig(), "sites": (Site("embed", 0),), "num_tokens": 1, "out": Path("shards")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sites", ()),
        ("sites", (Site("embed", 0), Site("embed", 0))),
        ("num_tokens", 0),
        ("bucket_rows", 0),
        ("batch_blocks", 0),
        ("dtype", "float16"),
        ("seed", -1),
        ("rows", 5),
        ("partition", (2, 2)),
        ("partition", (-1, 2)),
        ("partition", (0, 0)),
        ("max_bytes", 0),
        ("shuffle_bytes", 0),
    ],
)
def test_what_cannot_be_harvested_is_refused_by_field(field, value):
    with pytest.raises(ValidationError, match=field):
        HarvestConfig(**FIELDS | {field: value})


def test_the_record_reads_back_and_leaves_out_what_changes_no_byte():
    config = HarvestConfig(**FIELDS)
    assert set(HarvestConfig.model_fields) - set(config.record()) == {"out", "partition", "max_bytes", "shuffle_bytes", "repair"}
    assert HarvestConfig.model_validate(config.record() | {"out": "shards"}) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [("site", "tokens"), ("site", "../up"), ("site", ""), ("dtype", "float16"), ("skip_positions", -1), ("bucket_rows", 0)],
)
def test_what_cannot_be_imported_is_refused_by_field(field, value):
    fields = {"source": Path("a.npy"), "site": "vision", "out": Path("shards")}
    assert ImportConfig(**fields)
    with pytest.raises(ValidationError, match=field):
        ImportConfig(**fields | {field: value})
