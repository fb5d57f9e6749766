"""Training presets with a name: which fields of a SaePreset to set together, and for what budget."""

import math
from typing import Literal, get_args

from everyscope.base.errors import ConfigError
from everyscope.sae.config import SaePreset


def gemma_scope() -> SaePreset:
    """The paper's (arXiv 2408.05147, section 3.2). Wants some 10^9 rows; sparsity is chosen by the coefficient."""
    return SaePreset()


def gemma_scope_2() -> SaePreset:
    """The paper's optimiser with Gemma Scope 2's ideas: an L0 to aim at, no latent above 10 %, nested dictionaries.

    Give each SaeConfig a target_l0. That report states neither the prefixes nor any weight: these are ours.
    """
    return SaePreset(frequency_limit=0.1, prefix_shares=(1 / 16, 1 / 4, 1.0))


def fast(d_in: int) -> SaePreset:
    """For 10^5 to 10^8 rows of size `d_in`; give each SaeConfig a target_l0, and train on batches of 256 rows.

    The paper's thresholds need 10^9 rows to find their place. Here they begin at the quantile that gives the target L0 and are
    held there together while directions form (as BatchTopK does, arXiv 2412.06410), then each learns its own by the paper's
    gradients, so that what comes out is trained on the true loss. Weights have size 1 / sqrt(d_in), and so do steps.

    What lets so few rows suffice is how directions move: three times as far as an encoder does in a step, along the gradient
    itself, with the encoder at their heels. Steps are bounded, because at these rates one row of ten times the usual norm can
    end an SAE. What each is worth is measured in docs/log.md.
    """
    return SaePreset(
        learning_rate=FAST_RATE / math.sqrt(d_in),
        learning_rate_warmup_steps=20,
        learning_rate_decay=0.4,
        sparsity_warmup_steps=0,
        bandwidth=0.004,
        encoder_scale=0.5,
        encoder_follows=True,
        direction_rate=3 * FAST_RATE,
        largest_step=3.0,
        is_centred=True,
        largest_row=4.0,
        warm_start=True,
        driven_share=0.7,
        revive_steps=10,
    )


def fast_transcoder(d_in: int) -> SaePreset:
    """`fast` for transcoders that read activations of size `d_in`, of 10^5 to 10^8 rows; give each SaeConfig a target_l0."""
    return for_transcoders(fast(d_in))


def for_transcoders(preset: SaePreset) -> SaePreset:
    """The preset without what only SAEs can have: a transcoder's encoder follows no directions, which live in another space."""
    return preset.model_copy(update={"encoder_follows": False})


FAST_RATE = 0.035
"""Of a weight's size, what a step changes it by [1]."""

PresetName = Literal["fast", "fast_transcoder", "gemma_scope", "gemma_scope_2"]


def preset_of(name: PresetName, d_in: int) -> SaePreset:
    """The preset of that name for activations of size `d_in`; ConfigError for another name."""
    match name:
        case "fast":
            return fast(d_in)
        case "fast_transcoder":
            return fast_transcoder(d_in)
        case "gemma_scope":
            return gemma_scope()
        case "gemma_scope_2":
            return gemma_scope_2()
        case _:
            raise ConfigError(f"preset={name!r}: expected one of {', '.join(get_args(PresetName))}")
