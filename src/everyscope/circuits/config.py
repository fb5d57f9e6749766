"""What a graph is made of and how large it may become. Torch-free."""

from dataclasses import dataclass

from pydantic import Field

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema
from everyscope.sites.names import SUBLAYERS, SiteKind

MAX_DIGITS = 12
"""Of a number that somebody types: more are no position, latent or layer [digits]."""


class AttributionConfig(Schema):
    """How much of a circuit is computed and kept."""

    max_logits: int = Field(default=10, gt=0)
    """Likeliest next tokens that are targets, at most [tokens]."""
    logit_share: float = Field(default=0.95, gt=0, le=1)
    """As many of the likeliest next tokens are targets as together have this probability, if max_logits allows [1]."""
    max_latents: int = Field(default=2048, gt=0)
    """Active latents whose inputs are computed, the most influential ones first; the others are in no graph [latents]."""
    edges_per_node: int = Field(default=4096, gt=0)
    """Inputs of one node that are kept, the strongest; the sum of the others is kept as one number [edges]."""
    rank_every: int = Field(default=4, gt=0)
    """After how many blocks of rows latents are ranked by influence again [blocks]."""
    memory_gib: float = Field(default=1.0, gt=0)
    """What a block of rows may take, which decides how many rows are computed at once; kept edges, weights of the model and of
    transcoders, and the attention pattern of one layer come on top [GiB]."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Time after which no further latents' inputs are computed; None sets no limit. How many there are then depends on the
    machine [s]."""


@dataclass(frozen=True)
class TargetTokens:
    """Target: the logits of these next tokens, each weighted by its probability; ids, or texts that are one token each."""

    tokens: tuple[int | str, ...]


@dataclass(frozen=True)
class Contrast:
    """Target: the logit of one token minus that of another."""

    token: int | str
    against: int | str


@dataclass(frozen=True)
class Latent:
    """Target: a latent that is active at a position of the prompt, which counts BOS as 0."""

    layer: int
    position: int
    latent: int
    kind: SiteKind | None = None
    """Kind of its site, which only graphs of several SAEs in one layer need."""

    @classmethod
    def parse(cls, text: str) -> "Latent":
        """Of layer.position.latent, as in 2.7.311 or mlp_out.2.7.311; ConfigError for anything else."""
        *kind, layer, position, latent = ["", "", *text.split(".")]
        kind = [part for part in kind if part]
        numbers = (layer, position, latent)
        is_number = all(part.isdecimal() and len(part) <= MAX_DIGITS for part in numbers)
        if not is_number or len(kind) > 1 or not set(kind) <= {*SUBLAYERS}:
            raise ConfigError(f"latent {text[:60]}: expected layer.position.latent, as in 2.7.311 or mlp_out.2.7.311")
        return cls(*map(int, numbers), kind=next((one for one in SUBLAYERS if one in kind), None))


Target = TargetTokens | Contrast | Latent | None
"""What a graph explains; None: the likeliest next tokens."""
