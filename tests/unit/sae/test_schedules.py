"""Learning rate and sparsity over a run."""

import pytest

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.schedules import learning_rate_share, sparsity_weight


def test_the_papers_warm_ups():
    preset = SaePreset()
    assert learning_rate_share(preset, 0, 10**6) == pytest.approx(0.1)
    assert learning_rate_share(preset, 500, 10**6) == pytest.approx(0.55)
    assert [learning_rate_share(preset, step, 10**6) for step in (1000, 500_000, 999_999)] == [1.0, 1.0, 1.0]
    config = SaeConfig(width=1, sparsity_coefficient=6e-4)
    assert [sparsity_weight(config, step) for step in (0, 5000, 10_000, 10**6)] == pytest.approx([0, 3e-4, 6e-4, 6e-4])


def test_decay_ends_at_zero():
    preset = SaePreset(learning_rate_warmup_steps=0, learning_rate_decay=0.25)
    assert [learning_rate_share(preset, step, 100) for step in (0, 75, 90, 100)] == pytest.approx([1, 1, 0.4, 0])
