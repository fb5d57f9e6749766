"""When a share of an ablation's cost can be given."""

import pytest
from pydantic import ValidationError

from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.scores import too_cheap
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig


@pytest.mark.parametrize(
    ("cost", "interval", "is_cheap"),
    [
        (5.6, [5.1, 6.2], False),
        (0.038, [0.025, 0.05], False),
        (0.038, [0.018, 0.055], True),
        (0.038, [-0.01, 0.09], True),
        (-0.002, [-0.01, 0.004], True),
        (-2.0, [-2.1, -1.9], True),
        (0.0, [0.0, 0.0], True),
        (5.6, None, True),
    ],
)
def test_a_cost_must_be_known_to_half_of_itself(cost: float, interval, is_cheap: bool):
    reason = too_cheap(cost, interval)
    assert (reason is not None) == is_cheap
    assert reason is None or f"costs {cost:.3g} nats/token" in reason


def config(**changes) -> EvaluateConfig:
    return EvaluateConfig(model=ModelConfig(), text=TextConfig(context=256), trained="t", out="o", **changes)


@pytest.mark.parametrize("num_sequences", [1, 2, 16, 31, 32, 64, 2048])
def test_baselines_cost_at_most_a_third_of_the_saes(num_sequences: int):
    """Of an SAE alone at its site: three baselines of its own and two ablations; from 32 blocks on."""
    blocks = config(num_sequences=num_sequences).baseline_blocks
    assert 1 <= blocks <= num_sequences
    if num_sequences >= 32:
        assert 5 * blocks <= num_sequences / 3


def test_blocks_that_are_given_are_taken():
    assert config(num_sequences=64, baseline_sequences=8).baseline_blocks == 8
    assert config(num_sequences=4, baseline_sequences=8).baseline_blocks == 4
    assert config(baseline_sequences=0).baseline_blocks == 0
    assert config(calibration_sequences=3).calibration_blocks == 3
    assert config(num_sequences=4).calibration_blocks * 256 >= 8192
    assert config(num_sequences=5000).calibration_blocks == 64
    with pytest.raises(ValidationError, match="max_norm"):
        config(max_norm=1.5)
