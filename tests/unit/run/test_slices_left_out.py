"""Comparisons that would say nothing about the run's own text are left out, with the reason."""

from pathlib import Path

import pytest

from everyscope.evaluate.comparisons.config import ProbingConfig, Subset, SubsetsConfig
from everyscope.run.config import RunConfig
from everyscope.run.recipes.tiny import recipe
from everyscope.run.settings import CompareSettings
from everyscope.text.config import TextConfig

PROSE = TextConfig(source="files", paths=(Path("english.jsonl"),))


def kinds(config: RunConfig) -> set[type]:
    return {type(one) for one in config.comparison_configs(Path("runs/x"))}


def test_python_text_is_probed_and_compared_with_other_corpora():
    assert recipe().slices_left_out == {}
    assert {ProbingConfig, SubsetsConfig} <= kinds(recipe())


def test_other_text_is_not_and_the_reason_is_given():
    config = recipe().model_copy(update={"text": PROSE})
    assert set(config.slices_left_out) == {"probing", "subsets"}
    assert all("not" in reason for reason in config.slices_left_out.values())
    assert not {ProbingConfig, SubsetsConfig} & kinds(config)


@pytest.mark.parametrize("slices", [("subsets",), ("widths", "subsets", "probing")])
def test_corpora_of_ones_own_are_compared_on_any_text(slices):
    compare = CompareSettings(slices=slices, subsets=(Subset(name="mine", text=PROSE),))
    config = recipe().model_copy(update={"text": PROSE, "compare": compare})
    assert SubsetsConfig in kinds(config)
    assert set(config.slices_left_out) == {"probing"} & set(slices)
