"""Prices against the paper's own figures and against sums done by hand."""

from pathlib import Path

import pytest

from everyscope.run.config import RunConfig
from everyscope.run.cost.machine import plan, plan_json, storage_options
from everyscope.run.cost.prices import Rates
from everyscope.run.find import find_recipe
from everyscope.run.stages import stages_of
from everyscope.sites.names import Site

TIB, PIB = 2**40, 2**50
GIVEN = Rates(1e12, 1e12, "given")


def price(name: str):
    return plan(stages_of(find_recipe(name), Path()), GIVEN, disk_gbps=1.0)


def test_one_9b_site_at_8b_tokens_is_about_100_tib():
    size = price("gemma_2_9b").bytes_of[Site("resid_post", 20)]
    assert size == 8 * 10**9 * 3584 * 4
    assert size / TIB == pytest.approx(100, rel=0.05)


def test_all_sites_of_2b_and_9b_are_about_17_pib():
    total = price("gemma_2_2b").shard_bytes + price("gemma_2_9b").shard_bytes
    assert total / PIB == pytest.approx(17, rel=0.09)  # a straight count with the true attention widths gives 18.4


def test_bfloat16_fewer_sites_and_no_disk_bring_it_down():
    options = dict(storage_options(price("gemma_2_9b")))
    sizes = [options[name] for name in ("all 126 sites, float32", "all 126 sites, bfloat16", "the 42 residual sites, bfloat16")]
    assert sizes[0] == 2 * sizes[1] > 4 * sizes[2]
    assert min(options.values()) == 0


def test_an_sae_costs_ten_operations_a_parameter_pair_and_row():
    sae = next(sae for sae in price("gemma_2_9b").saes if sae.width == 2**17 and sae.site.kind == "resid_post")
    assert sae.flop == 10 * 3584 * 2**17 * 8e9
    assert sae.parameter_bytes == 4 * (2 * 3584 * 2**17 + 2 * 2**17 + 3584)  # the 3.76 GB file on the hub
    assert sae.parameter_bytes / 1e9 == pytest.approx(3.76, abs=0.01)


def table(config: RunConfig) -> set[tuple[str, int, int, int]]:
    """A recipe as rows of table 1: site, layers, log2 width, billions of tokens."""
    return {
        (kind, len(config.sites(group)) // len(group.sites), width.bit_length() - 1, group.num_tokens // 10**9)
        for group in config.groups
        for kind in group.sites
        for width in group.widths
    }


def test_suites_are_those_of_table_1():
    assert table(find_recipe("gemma_2_2b")) == {
        *((kind, 26, 14, 4) for kind in ("attn_out", "mlp_out", "resid_post")),
        *((kind, 26, 16, 8) for kind in ("attn_out", "mlp_out", "resid_post")),
        *(("resid_post", 1, width, 8) for width in (15, 17, 18, 19)),
        ("resid_post", 3, 20, 16),
    }
    assert table(find_recipe("gemma_2_9b")) == {
        *((kind, 42, 14, 4) for kind in ("attn_out", "mlp_out", "resid_post")),
        *((kind, 42, 17, 8) for kind in ("attn_out", "mlp_out", "resid_post")),
        *(("resid_post", 1, width, 8) for width in (15, 16, 18, 19)),
        ("resid_post", 3, 20, 16),
    }
    assert table(find_recipe("gemma_2_27b")) == {("resid_post", 3, 17, 8)}
    assert table(find_recipe("gemma_2_9b_it")) == {("resid_post", 3, 14, 4), ("resid_post", 3, 17, 8)}


def test_real_runs_use_the_papers_recipe():
    config = find_recipe("gemma_2_2b")
    recipe, train = config.preset, config.train
    assert (recipe.learning_rate, recipe.bandwidth, recipe.initial_threshold, recipe.beta2) == (7e-5, 1e-3, 1e-3, 0.999)
    assert (recipe.learning_rate_warmup_steps, recipe.sparsity_warmup_steps, train.batch_rows) == (1000, 10_000, 4096)
    assert (config.text.context, config.evaluate.num_sequences, config.harvest.dtype) == (1024, 2048, "float32")


def test_the_json_names_every_sae():
    value = plan_json(price("tiny"))
    assert len(value["saes"]) == value["num_saes"] == 84
    assert sum(site["bytes"] for site in value["sites"]) == value["shard_bytes"]
    training = next(stage["seconds"] for stage in value["stages"] if stage["name"] == "train")
    assert training == pytest.approx(sum(sae["flop"] for sae in value["saes"]) / 1e12)
    assert value["hours"] == pytest.approx(sum(stage["seconds"] for stage in value["stages"]) / 3600)


def test_training_by_pairs_is_priced_at_its_one_product():
    config = find_recipe("tiny")
    by_pairs = plan(stages_of(config, Path()), GIVEN, disk_gbps=1.0)
    slow = config.model_copy(update={"train": config.train.model_copy(update={"engine": "dense"})})
    dense = plan(stages_of(slow, Path()), GIVEN, disk_gbps=1.0)
    assert dense.train_flop == 5 * by_pairs.train_flop
    assert {sae.target_l0 for sae in by_pairs.saes} == {12, 25, 50}
