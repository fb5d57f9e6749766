"""What is described, from how much text, and how many examples of each latent are kept."""

from pathlib import Path

from pydantic import Field, model_validator

from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig

MAX_TOKENS = 2**31 - 1
"""Places in the text are kept as int32 [tokens]."""


class DescribeConfig(Schema):
    """One description of all trained SAEs of one model: what each of their latents fires on, and what it writes."""

    model: ModelConfig
    """The language model that the SAEs are of."""
    text: TextConfig
    """The corpus; both its training documents and its held-out ones are read."""
    trained: Path
    """Folder written by `everyscope train`: every SAE in it is described."""
    scores: Path
    """Folder written by `everyscope evaluate`: L0s, and how often each latent fires on held-out text."""
    out: Path
    """Folder for the descriptions; is copied into the suite when that is published."""
    num_sequences: int = Field(default=4096, gt=1)
    """Blocks read, half of them from training documents and half from held-out ones; fewer where a split ends early [blocks]."""
    train_stride: int = Field(default=8, gt=0)
    """Distance between blocks of the training documents that are read, so that more documents are seen; smaller where the text
    is too short for that [blocks]."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    portion_batches: int = Field(default=4, gt=0)
    """Batches between two saves; the firings of so many are held in memory, 8 bytes each [batches]."""
    saes_at_once: int | None = Field(default=None, gt=0)
    """SAEs held in memory; more than that cost another pass of the model. None holds all [SAEs]."""
    codes_bytes: int = Field(default=2**34, gt=0)
    """Disk that firings may take until they are described; a suite with more of them is described in several passes [bytes]."""
    top_examples: int = Field(default=12, ge=0)
    """Strongest examples kept of each latent, at most one from a block [examples]."""
    group_examples: int = Field(default=3, ge=0)
    """Examples drawn from each fifth of a latent's firings [examples]."""
    examples_per_document: int = Field(default=3, gt=0)
    """Strongest examples that may come from one document [examples]."""
    window_before: int = Field(default=20, ge=0)
    """Tokens shown before an example's own; fewer where its block begins [tokens]."""
    window_after: int = Field(default=11, ge=0)
    """Tokens shown behind it; fewer where its block ends [tokens]."""
    neighbours: int = Field(default=8, ge=0)
    """Nearest latents kept for each relation, as in wider SAEs or at the next layer [latents]."""
    raw_logits: bool = False
    """Also the tokens that each direction writes for and against without the norms' gains, as other tools have them; takes the
    logit lens twice as long."""
    seed: int = Field(default=0, ge=0)
    """Seed of the examples' drawing and of the halves of the documents."""

    @property
    def portion_blocks(self) -> int:
        """Blocks between two saves [blocks]."""
        return self.batch_blocks * self.portion_batches

    @property
    def window(self) -> int:
        """Tokens of a whole window [tokens]."""
        return self.window_before + 1 + self.window_after

    @model_validator(mode="after")
    def _check(self) -> "DescribeConfig":
        if self.num_sequences * self.text.context > MAX_TOKENS:
            raise ValueError(
                f"num_sequences={self.num_sequences} of {self.text.context} tokens exceed {MAX_TOKENS}; lower num_sequences"
            )
        return self
