"""Each field of an SAE's config has one meaning, and one that would be ignored is refused."""

import pytest
from pydantic import ValidationError

from everyscope.run.settings import SaeGroup
from everyscope.sae.config import SaeConfig
from everyscope.train.config import sae_name


def test_a_target_needs_no_other_number():
    config = SaeConfig(width=4096, target_l0=50)
    assert config.sparsity_weight == config.target_weight == 4.0
    assert SaeConfig(width=4096, target_l0=50, target_weight=0.5).sparsity_weight == 0.5
    assert SaeConfig(width=4096, sparsity_coefficient=1e-3).sparsity_weight == 1e-3


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "neither target_l0 nor sparsity_coefficient"),
        ({"target_l0": 50, "sparsity_coefficient": 4}, "leave one of the two out"),
        ({"sparsity_coefficient": 1e-3, "target_weight": 1}, "holds a target_l0, and there is none"),
        ({"target_l0": 50, "target_weight": -1}, "target_weight"),
        ({"target_l0": 0}, "target_l0"),
        ({"target_l0": 4097}, "no more latents than there are"),
    ],
)
def test_fields_that_contradict_or_would_be_ignored_are_refused(fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        SaeConfig(width=4096, **fields)


@pytest.mark.parametrize("fields", [{"target_l0": 50}, {"target_l0": 5, "target_weight": 1.5}, {"sparsity_coefficient": 1e-3}])
def test_a_record_names_the_weight_that_acts_alone_and_reads_back(fields):
    config = SaeConfig(width=64, **fields)
    record = config.as_json()
    assert ("target_weight" in record) == (config.target_l0 is not None) == ("sparsity_coefficient" not in record)
    assert SaeConfig.model_validate(record) == config


def test_names_of_folders_say_what_was_aimed_at():
    assert sae_name(SaeConfig(width=64, target_l0=12.5)) == "width_64_l0_12.5_seed_0"
    assert sae_name(SaeConfig(width=64, sparsity_coefficient=1e-3, seed=2)) == "width_64_sparsity_0.001_seed_2"


def test_a_group_aims_or_prices():
    common = {"sites": ("mlp_out",), "widths": (8,), "num_tokens": 4096}
    assert SaeGroup(**common, target_l0s=(3,)).target_weight == 4.0
    for both in ({}, {"target_l0s": (3,), "sparsity_coefficients": (1e-3,)}):
        with pytest.raises(ValidationError, match="give one of them, or make two groups"):
            SaeGroup(**common, **both)
