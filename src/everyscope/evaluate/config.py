"""What is evaluated, on which text, and where the scores go."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from everyscope.activations.shards.norms import MAX_NORM, TAIL
from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site, SiteKind
from everyscope.text.config import TextConfig

SaeDtype = Literal["float32", "bfloat16", "int8"]
"""bfloat16: weights and arithmetic; int8: weights on 255 levels per latent, arithmetic in float32."""


MOST_CALIBRATION_BLOCKS, LEAST_CALIBRATION_TOKENS = 64, 8192
"""Without shards, by default [blocks], [tokens]."""
SAE_BLOCKS_PER_BASELINE, LEAST_BASELINE_BLOCKS = 16, 2
"""By default baselines, five for a site of one SAE, are spliced in one of this many blocks, in at least this many [blocks]."""


class EvaluateConfig(Schema):
    """One evaluation of many SAEs of one model, on the held-out documents of one text."""

    model: ModelConfig
    """The language model whose activations are reconstructed and whose loss is measured."""
    text: TextConfig
    """The corpus; scores are of its held-out documents."""
    trained: Path
    """The SAEs: a folder written by `everyscope train`, a published suite, or a folder of SAEs and transcoders of another project
    (docs/reference/formats.md). Every one in it is evaluated."""
    out: Path
    """Folder for the scores; lies beside `trained`, is copied into the suite when that is published."""
    shards: Path | None = None
    """Folder written by `everyscope harvest`: training rows, for the baselines. None reads the text's training documents."""
    sites: tuple[Site, ...] | None = None
    """Evaluate only the SAEs of these sites; None takes all."""
    saes: tuple[str, ...] | None = None
    """Evaluate only these SAEs, by their folder below `trained`, as in resid_post/layer_2/width_512_l0_25; None takes all."""
    site_kind: SiteKind | None = None
    """The kind of site of SAEs whose path does not tell it; the layer is always read from the path."""
    max_norm: float | None = Field(default=MAX_NORM, ge=TAIL)
    """Rows of a site above this multiple of its median norm are massive: they are not reconstructed, and left out of every
    number but plain FVU. None reconstructs every row [1]."""
    num_sequences: int = Field(default=2048, gt=0)
    """Held-out blocks that are measured, from the first on; fewer where the text ends early [blocks]."""
    stride: int = Field(default=1, gt=0)
    """Distance between held-out blocks that are read: where documents are long, a larger one sees more of them, and intervals
    become narrower [blocks]."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    checkpoint_batches: int = Field(default=16, gt=0)
    """Interval at which the sums are saved [batches]."""
    saes_at_once: int | None = Field(default=None, gt=0)
    """SAEs held in memory at once; more are taken in turns, each with clean passes of its own. None holds all [SAEs]."""
    sae_dtype: SaeDtype = "float32"
    """Number format that the SAEs are rounded to before they are evaluated."""
    pca_rows: int = Field(default=2**17, gt=1)
    """Training rows of `shards` behind covariance, norms and thresholds [rows]."""
    calibration_sequences: int | None = Field(default=None, gt=0)
    """Training blocks that are read for the same where there are no shards. None reads as many as are measured, 64 at most, but
    8,192 tokens at least [blocks]."""
    uniformity_sequences: int = Field(default=16, ge=0)
    """Blocks, from the first on, on which the uniformity of latents' importance is measured; 0 leaves it out [blocks]."""
    gradient_blocks: int = Field(default=4, gt=0)
    """Blocks per forward pass among those: their passes keep what a backward pass needs [blocks]."""
    baseline_sequences: int | None = Field(default=None, ge=0)
    """Blocks, from the first on, in which ablations and baselines are spliced, for their delta loss and the share of loss
    recovered; 0 leaves these out. None bounds their cost to a third of the SAEs' [blocks]."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples of the documents behind each interval [resamples]."""
    interval_level: float = Field(default=0.95, gt=0, lt=1)
    """Share of intervals that hold the true value [1]."""
    seed: int = Field(default=0, ge=0)
    """Seed of random dictionaries and of the documents' drawing."""

    @property
    def calibration_blocks(self) -> int:
        """Training blocks that are read where there are no shards [blocks]."""
        if self.calibration_sequences is not None:
            return self.calibration_sequences
        return max(min(self.num_sequences, MOST_CALIBRATION_BLOCKS), -(-LEAST_CALIBRATION_TOKENS // self.text.context))

    @property
    def baseline_blocks(self) -> int:
        """Blocks in which baselines are spliced. An SAE has three of its own, and its site two ablations [blocks]."""
        if self.baseline_sequences is not None:
            return min(self.baseline_sequences, self.num_sequences)
        return min(max(LEAST_BASELINE_BLOCKS, self.num_sequences // SAE_BLOCKS_PER_BASELINE), self.num_sequences)
