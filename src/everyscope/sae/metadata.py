"""What is known of a finished SAE or transcoder beyond its tensors. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from everyscope.sites.names import InputConvention, Site, site_of

CoderKind = Literal["sae", "transcoder"]
"""An sae reconstructs what it reads; a transcoder predicts another place."""


@dataclass(frozen=True)
class SaeMetadata:
    """Where an SAE or transcoder sits and how it was made; None for what its file does not say."""

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
    target: Site | None = None
    """The place that a transcoder writes; None for an SAE, which reconstructs what it reads."""
    convention: InputConvention | None = None
    """Of a transcoder, the form of what it takes; None for an SAE."""
    kind: CoderKind = "sae"
    """What it is; with a target it is a transcoder, which may be said without one."""

    def __post_init__(self) -> None:
        """A target makes a transcoder."""
        if self.target is not None:
            object.__setattr__(self, "kind", "transcoder")

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another place than the one it reads."""
        return self.kind == "transcoder"

    @property
    def coder_site(self) -> Site | None:
        """Where it sits: an SAE's site, a transcoder's `Site("transcoder", L)`; None where that has no name."""
        writes = self.target if self.is_transcoder else self.site
        return None if self.site is None or writes is None else site_of(self.site, writes)

    @property
    def hook_in(self) -> str | None:
        """TransformerLens's name of what it takes, as in blocks.3.mlp.hook_in."""
        if self.site is not None and self.convention == "normalised":
            return NORMALISED_HOOK.format(layer=self.site.layer)
        return None if self.site is None else self.site.hook_name

    @property
    def hook_out(self) -> str | None:
        """TransformerLens's name of what it writes, as in blocks.3.hook_mlp_out."""
        writes = self.target if self.is_transcoder else self.site
        return None if writes is None else writes.hook_name


NORMALISED_HOOK = "blocks.{layer}.ln2.hook_normalized"
"""TransformerLens's name of what an MLP reads, without its norm's gain."""
