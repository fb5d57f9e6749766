"""Learning rate and weight of sparsity as functions of the step (Gemma Scope, section 3.2)."""

import math

from everyscope.sae.config import SaeConfig, SaeRecipe


def learning_rate_share(recipe: SaeRecipe, step: int, steps: int) -> float:
    """The share of the learning rate in force at `step` of `steps`: cosine from 0.1 to 1, flat, then linear to 0 if asked."""
    warm = 1.0
    if step < recipe.learning_rate_warmup_steps:
        warm = 0.1 + 0.9 * (1 - math.cos(math.pi * step / recipe.learning_rate_warmup_steps)) / 2
    decay_steps = recipe.learning_rate_decay * steps
    return warm * (min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0)


def threshold_rate(config: SaeConfig, step: int, steps: int) -> float:
    """Adam's step size for thresholds at `step` of `steps`; zero while they are driven."""
    recipe = config.recipe
    rate = recipe.threshold_learning_rate or recipe.learning_rate
    return 0.0 if is_driven(config, step, steps) else rate * learning_rate_share(recipe, step, steps)


def direction_rate(recipe: SaeRecipe, step: int, steps: int) -> float:
    """Step size for directions at `step` of `steps`; zero where the recipe has none of its own."""
    return (recipe.direction_rate or 0.0) * learning_rate_share(recipe, step, steps)


def skip_rate(recipe: SaeRecipe, step: int, steps: int) -> float:
    """Adam's step size for a skip at `step` of `steps`."""
    rate = recipe.learning_rate if recipe.skip_learning_rate is None else recipe.skip_learning_rate
    return rate * learning_rate_share(recipe, step, steps)


def is_driven(config: SaeConfig, step: int, steps: int) -> bool:
    """True in the phase in which thresholds are set from the L0 they give, not learned."""
    return step < config.recipe.driven_share * steps


def sparsity_weight(config: SaeConfig, step: int) -> float:
    """The factor of the sparsity term at `step`: linear from 0 over the warm-up, then constant."""
    warmup = config.recipe.sparsity_warmup_steps
    return config.sparsity_weight * (min(1.0, step / warmup) if warmup else 1.0)
