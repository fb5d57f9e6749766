"""Prices of stages against sums done by hand."""

import os
from pathlib import Path

import pytest

from everyscope.run.cost.prices import LABEL_SECONDS, Rates, StagePrice, pass_flop, stage_prices, stage_seconds
from everyscope.run.find import RECIPES, find_recipe
from everyscope.run.settings import ModelShape
from everyscope.run.stages import Stages, stages_of

RATES = Rates(model=1e12, saes=5e11, origin="given")


def priced(name: str, rates: Rates = RATES, **changes) -> tuple[Stages, dict[str, StagePrice]]:
    config = find_recipe(name).model_copy(update=changes)
    stages = stages_of(config, Path())
    return stages, {stage.name: stage for stage in stage_prices(stages, rates)}


def test_layers_behind_the_last_site_and_the_unembedding_are_not_counted():
    shape = ModelShape(num_layers=10, d_model=100, d_attention=100, num_parameters=3_000_000, vocabulary=20_000)
    assert shape.in_blocks == 1_000_000
    assert pass_flop(shape, 0, 4, logits=False) == 2 * 400_000
    assert pass_flop(shape, 4, 10, logits=True) == 2 * (600_000 + 2_000_000)
    assert shape.model_copy(update={"num_block_parameters": 900_000}).in_blocks == 900_000


def test_a_harvest_runs_up_to_its_last_layer():
    whole, prices = priced("smollm2_135m")
    shape, tokens = whole.config.sizes, 50_000_000
    assert prices["harvest"].seconds == pytest.approx(tokens * 2 * shape.in_blocks * 25 / 30 / 1e12)
    group = whole.config.groups[0]
    _, shallow = priced("smollm2_135m", groups=(group.model_copy(update={"layers": (2,)}),))
    assert shallow["harvest"].seconds == pytest.approx(prices["harvest"].seconds * 3 / 25)


def test_training_costs_its_operations():
    whole, prices = priced("smollm2_135m")
    flop = sum(10 * 576 * sae.width * group.num_tokens for group in whole.groups for sae in group.saes)
    assert prices["train"].seconds == pytest.approx(flop / 5e11)


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_every_recipe_has_a_price_that_falls_with_the_rates(name):
    stages, prices = priced(name)
    wanted = {"harvest", "train", "evaluate", "describe", "explain", "publish"}
    assert wanted <= prices.keys()
    assert len([one for one in prices if one.startswith("compare ")]) == len(stages.comparisons)
    assert all(prices[one].seconds > 0 for one in wanted)
    _, faster = priced(name, Rates(2e12, 1e12, "given"))
    for one in ("harvest", "train"):
        assert faster[one].seconds == pytest.approx(prices[one].seconds / 2)
    workers = (os.cpu_count() or 1) if stages.config.model.device == "cpu" else 1
    labels = LABEL_SECONDS * sum(sae.width for group in stages.parts[0].train for sae in group.saes) / workers
    assert faster["explain"].seconds - labels == pytest.approx((prices["explain"].seconds - labels) / 2)


def test_an_evaluation_grows_with_its_saes_and_its_blocks():
    _, prices = priced("tiny")
    config = find_recipe("tiny")
    _, twice = priced("tiny", evaluate=config.evaluate.model_copy(update={"num_sequences": 128, "baseline_sequences": 16}))
    assert twice["evaluate"].seconds == pytest.approx(2 * prices["evaluate"].seconds)
    fewer = config.groups[0].model_copy(update={"widths": (512,)})
    _, half = priced("tiny", groups=(fewer,))
    assert 0.4 * prices["evaluate"].seconds < half["evaluate"].seconds < 0.7 * prices["evaluate"].seconds


def test_a_stage_of_a_run_is_priced_with_its_controls_and_comparisons():
    stages, prices = priced("tiny")
    seconds = stage_seconds(stages, RATES)
    assert list(seconds) == ["harvest", "train", "evaluate", "describe", "explain", "publish"]
    assert sum(seconds.values()) == pytest.approx(sum(price.seconds for price in prices.values()))
    parts = [price.seconds for name, price in prices.items() if name.split()[0] in ("evaluate", "compare")]
    assert len(parts) > 4
    assert seconds["evaluate"] == pytest.approx(sum(parts))
