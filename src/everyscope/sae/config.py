"""What one SAE is to become: its width, its sparsity and its training preset. Defaults are Gemma Scope's (section 3.2)."""

import math
from itertools import pairwise
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from everyscope.base.schema import Schema

TARGET_WEIGHT = 4.0
"""The usual target_weight, with which the preset `fast` was chosen (docs/log.md) [1]."""


class SaePreset(Schema):
    """How a JumpReLU SAE is trained, on activations scaled to unit mean squared norm."""

    learning_rate: float = Field(default=7e-5, gt=0)
    """Adam's step size after its warm-up [1]."""
    learning_rate_warmup_steps: int = Field(default=1000, ge=0)
    """Cosine warm-up of the learning rate from a tenth of it [steps]."""
    learning_rate_decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, at its end, over which the learning rate falls linearly to zero; 0 keeps it constant [1]."""
    threshold_learning_rate: float | None = Field(default=None, gt=0)
    """Adam's step size for thresholds alone; None uses learning_rate [1]."""
    sparsity_warmup_steps: int = Field(default=10_000, ge=0)
    """Linear warm-up of the sparsity coefficient from zero [steps]."""
    bandwidth: float = Field(default=1e-3, gt=0)
    """Width of the box kernel around a threshold through which it gets its gradient [normalised activation]."""
    initial_threshold: float = Field(default=1e-3, gt=0)
    """Every latent's threshold at the start [normalised activation]."""
    encoder_scale: float = Field(default=1.0, gt=0)
    """W_enc starts as this times the transpose of W_dec [1]."""
    encoder_follows: bool = False
    """Where a latent's direction moves, its row of W_enc moves along, by encoder_scale times that and weighed by coordinate with
    the inverse root of the first batch's variances; W_enc starts weighed likewise."""
    direction_rate: float | None = Field(default=None, gt=0)
    """About what angle a step turns a latent's direction by: Adam on W_dec with one mean of squares per row, so that a step keeps
    the gradient's direction. None moves each number of W_dec by Adam with learning_rate [rad]."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Adam's decay of squared gradients; the decay of gradients is 0, so there is no momentum [1]."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradients' mean [1]."""
    largest_step: float | None = Field(default=None, ge=1)
    """A step is at most so many times its rate, however far a gradient is above the root of its mean of squares. None lets a
    single batch move a parameter by up to rate / sqrt(1 - beta2), from which training may not recover. Thresholds are free: some
    have far to go when they begin to learn [1]."""
    is_centred: bool = False
    """Subtract the mean of the activations before training; it is folded back, so files are the same. The paper does not [1]."""
    largest_row: float | None = Field(default=None, gt=1)
    """Rows of more than so many times the root mean squared norm, centred if rows are, are shortened to that in training. The
    limit on massive rows is about norms as they come, and lets rows pass that are huge once a large mean is gone [1]."""
    warm_start: bool = False
    """Begin with b_dec at the first batch's mean and, given a target_l0, thresholds at the quantile that meets it there."""
    driven_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, at its start, in which all thresholds are moved together to hold target_l0, not learned [1]."""
    revive_steps: int | None = Field(default=None, ge=1)
    """In that phase thresholds of latents that have not fired for so long are lowered until they do; None never [steps]."""
    frequency_limit: float | None = Field(default=None, gt=0, le=1)
    """Share of rows above which a latent's firing costs extra; None never [1]."""
    frequency_coefficient: float = Field(default=0.1, ge=0)
    """Weight of that cost, sum_i max(0, rate_i / frequency_limit - 1)^2 [1]."""
    skip_learning_rate: float | None = Field(default=None, ge=0, exclude_if=lambda value: value is None)
    """Adam's step size for a transcoder's skip; 0 freezes it, None uses learning_rate [1]."""
    prefix_shares: tuple[float, ...] = (1.0,)
    """Matryoshka: the first latents, by these shares of the width, must reconstruct alone; ascending, the last is 1 [1]."""

    @model_validator(mode="after")
    def _check(self) -> "SaePreset":
        shares = self.prefix_shares
        if not shares or shares[-1] != 1 or shares[0] <= 0 or any(a >= b for a, b in pairwise(shares)):
            raise ValueError(f"prefix_shares={shares}: expected ascending shares of the width that end in 1, as 0.25 0.5 1")
        if self.encoder_follows and (self.direction_rate is None or not self.warm_start):
            raise ValueError("encoder_follows=True needs direction_rate (what is followed) and warm_start=True (variances)")
        if self.revive_steps is not None and not self.driven_share:
            raise ValueError(f"revive_steps={self.revive_steps} acts only while thresholds are driven; set driven_share above 0")
        return self


class SaeConfig(Schema):
    """One SAE of a training group."""

    width: int = Field(ge=1)
    """Number of latents, d_sae [latents]."""
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    """Lambda: what an active latent costs, in units of the mean squared norm of the activations; None with a target_l0 [1]."""
    target_l0: float | None = Field(default=None, gt=0)
    """L0 to aim at; None lets sparsity_coefficient decide [latents]."""
    target_weight: float = Field(default=TARGET_WEIGHT, ge=0)
    """How firmly target_l0 is held: sparsity costs target_weight * (L0 / target_l0 - 1)^2 [1]."""
    seed: int = 0
    """Seed of the decoder's initial directions."""
    skip: bool = Field(default=False, exclude_if=lambda value: not value)
    """Of a transcoder, whether an affine map from what it reads to what it writes stands beside its latents."""
    preset: SaePreset = SaePreset()
    """Optimiser, schedules and initial values."""

    @model_validator(mode="after")
    def _check(self) -> "SaeConfig":
        if self.target_l0 is None and self.sparsity_coefficient is None:
            raise ValueError("neither target_l0 nor sparsity_coefficient is given; give one, as in target_l0=50")
        if self.target_l0 is not None and self.sparsity_coefficient is not None:
            raise ValueError(
                f"sparsity_coefficient={self.sparsity_coefficient:g} with target_l0={self.target_l0:g}: a target is held by "
                "target_weight; leave one of the two out"
            )
        if self.target_l0 is not None and self.target_l0 > self.width:
            raise ValueError(
                f"target_l0={self.target_l0:g} with width={self.width}: no more latents than there are can be active; "
                "aim at fewer, usually 10 to 200"
            )
        if self.target_l0 is None and self.target_weight != TARGET_WEIGHT:
            raise ValueError(
                f"target_weight={self.target_weight:g} holds a target_l0, and there is none; give one or leave it out"
            )
        if self.preset.driven_share and self.target_l0 is None:
            raise ValueError(f"driven_share={self.preset.driven_share} needs target_l0: to what L0 are thresholds to be driven?")
        if len(set(self.prefixes)) < len(self.prefixes):
            raise ValueError(f"width={self.width} is too narrow for prefix_shares={self.preset.prefix_shares}")
        return self

    @model_serializer(mode="wrap")
    def _only_what_acts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the weight of the sparsity term that this SAE does not have."""
        idle = "target_weight" if self.target_l0 is None else "sparsity_coefficient"
        return {name: value for name, value in handler(self).items() if name != idle}

    @property
    def sparsity_weight(self) -> float:
        """The factor of the sparsity term: target_weight where there is a target, else sparsity_coefficient."""
        if self.target_l0 is not None:
            return self.target_weight
        assert self.sparsity_coefficient is not None, "checked when the config was built"
        return self.sparsity_coefficient

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Ends of the prefixes that reconstruct alone; the last is the width [latents]."""
        return tuple(math.ceil(share * self.width) for share in self.preset.prefix_shares)
