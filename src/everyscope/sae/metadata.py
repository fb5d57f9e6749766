"""What is known of a finished SAE beyond its tensors. Torch-free."""

from dataclasses import dataclass

from everyscope.sites.names import Site


@dataclass(frozen=True)
class SaeMetadata:
    """Where an SAE sits and how it was made; None for what its file does not say."""

    site: Site | None = None
    """The place in the model whose activations it takes."""
    model: str | None = None
    """The language model: a bundled model's name, a folder or a hub id."""
    l0: float | None = None
    """Mean number of active latents: on held-out text where it was evaluated, else over the end of its training [latents]."""
    scale: float | None = None
    """What activations were divided by in training, to a mean squared norm of 1; folded back, so that nothing is left to do."""
    num_tokens: int | None = None
    """Activation vectors that it saw in training [tokens]."""
