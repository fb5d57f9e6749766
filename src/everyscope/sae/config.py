"""What one SAE is to become: its width, its sparsity and its training recipe. Defaults are Gemma Scope's (section 3.2)."""

from pydantic import Field

from everyscope.base.schema import Schema


class SaeRecipe(Schema):
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
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Adam's decay of squared gradients; the decay of gradients is 0, so there is no momentum [1]."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradients' mean [1]."""


class SaeConfig(Schema):
    """One SAE of a bank."""

    width: int = Field(ge=1)
    """Number of latents, d_sae [latents]."""
    sparsity_coefficient: float = Field(ge=0)
    """Lambda: what an active latent costs, in units of the mean squared norm of the activations [1]."""
    seed: int = 0
    """Seed of the decoder's initial directions."""
    recipe: SaeRecipe = SaeRecipe()
    """Optimiser, schedules and initial values."""
