"""Learning rate and weight of sparsity as functions of the step (Gemma Scope, section 3.2)."""

import math

from everyscope.sae.config import SaeConfig, SaePreset


def learning_rate_share(preset: SaePreset, step: int, steps: int) -> float:
    """The share of the learning rate in force at `step` of `steps`: cosine from 0.1 to 1, flat, then linear to 0 if asked."""
    warm = 1.0
    if step < preset.learning_rate_warmup_steps:
        warm = 0.1 + 0.9 * (1 - math.cos(math.pi * step / preset.learning_rate_warmup_steps)) / 2
    decay_steps = preset.learning_rate_decay * steps
    return warm * (min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0)


def threshold_rate(config: SaeConfig, step: int, steps: int) -> float:
    """Adam's step size for thresholds at `step` of `steps`; zero while they are driven."""
    preset = config.preset
    rate = preset.threshold_learning_rate or preset.learning_rate
    return 0.0 if is_driven(config, step, steps) else rate * learning_rate_share(preset, step, steps)


def direction_rate(preset: SaePreset, step: int, steps: int) -> float:
    """Step size for directions at `step` of `steps`; zero where the preset has none of its own."""
    return (preset.direction_rate or 0.0) * learning_rate_share(preset, step, steps)


def skip_rate(preset: SaePreset, step: int, steps: int) -> float:
    """Adam's step size for a skip at `step` of `steps`."""
    rate = preset.learning_rate if preset.skip_learning_rate is None else preset.skip_learning_rate
    return rate * learning_rate_share(preset, step, steps)


def is_driven(config: SaeConfig, step: int, steps: int) -> bool:
    """True in the phase in which thresholds are set from the L0 they give, not learned."""
    return step < config.preset.driven_share * steps


def sparsity_weight(config: SaeConfig, step: int) -> float:
    """The factor of the sparsity term at `step`: linear from 0 over the warm-up, then constant."""
    warmup = config.preset.sparsity_warmup_steps
    return config.sparsity_weight * (min(1.0, step / warmup) if warmup else 1.0)
