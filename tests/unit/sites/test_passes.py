"""Blocks in a forward pass."""

import pytest

from everyscope.run.find import find_recipe
from everyscope.sites.config import ModelConfig
from everyscope.sites.passes import KEPT_BYTES, TOKENS, blocks_at_once


def test_a_cpu_takes_what_a_config_asks_for():
    assert blocks_at_once(4, 256, "cpu", 1) == 4


@pytest.mark.parametrize(
    ("least", "context", "bytes_per_token", "blocks"),
    [
        (4, 256, 1000, TOKENS // 256),  # full
        (4, 1024, KEPT_BYTES // 3000, 4),  # what is kept allows 2.9 blocks: never fewer than a config asks for
        (1, 1024, KEPT_BYTES // 3100, 3),
        (128, 256, 1000, 128),
        (1, 2**15, 1, 1),
    ],
)
def test_a_gpu_is_filled_as_far_as_memory_allows(least, context, bytes_per_token, blocks):
    for device in ("cuda", "cuda:1"):
        assert blocks_at_once(least, context, device, bytes_per_token) == blocks


def test_every_stage_of_a_run_on_a_gpu_takes_more_blocks(tmp_path):
    here = find_recipe("tiny")
    there = here.model_copy(update={"model": ModelConfig(device="cuda")})
    configs = [
        [make(tmp_path) for make in (one.harvest_config, one.evaluate_config, one.describe_config, one.explain_config)]
        for one in (here, there)
    ]
    assert [config.batch_blocks for config in configs[0]] == [4, 4, 4, 8]
    assert all(config.batch_blocks == TOKENS // config.text.context for config in configs[1])
