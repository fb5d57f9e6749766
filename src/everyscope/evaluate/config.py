"""What is evaluated, on which text, and where the scores go."""

from pathlib import Path

from pydantic import Field

from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig


class EvaluateConfig(Schema):
    """One evaluation of all trained SAEs of one model, on its held-out documents."""

    model: ModelConfig
    """The language model whose activations are reconstructed and whose loss is measured."""
    text: TextConfig
    """The corpus; only its held-out documents are read."""
    shards: Path
    """Folder written by `everyscope harvest`: the training rows' mean and covariance, for the baselines."""
    trained: Path
    """Folder written by `everyscope train`: every SAE in it is evaluated."""
    out: Path
    """Folder for the scores; lies beside `trained`, is copied into the suite when that is published."""
    num_sequences: int = Field(default=2048, gt=0)
    """Held-out blocks that are read, from the first on; fewer where the text ends early [blocks]."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    checkpoint_batches: int = Field(default=16, gt=0)
    """The sums are saved every so many batches [batches]."""
    pca_rows: int = Field(default=2**17, gt=1)
    """Training rows from which the PCA baseline's covariance is made [rows]."""
