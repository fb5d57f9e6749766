"""The parts of a recipe: the settings of each stage that do not follow from the others. Torch-free."""

from typing import Literal

from pydantic import Field, model_validator

from everyscope.activations.harvest.config import SHUFFLE_BYTES
from everyscope.base.schema import Schema
from everyscope.describe.explanations.config import EndpointConfig
from everyscope.evaluate.comparisons.config import Subset
from everyscope.sae.config import TARGET_WEIGHT
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import TRANSCODER_READS, Site, SiteKind
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings


class ModelShape(Schema):
    """The sizes that a plan needs, known before the model is downloaded; a run checks all but num_parameters against it."""

    num_layers: int = Field(ge=1)
    """Blocks of the model [layers]."""
    d_model: int = Field(ge=1)
    """Width of the residual stream and of the MLP's output."""
    d_attention: int = Field(ge=1)
    """Heads times head_dim, the width of attn_out."""
    num_parameters: int = Field(ge=1)
    """Parameters of the model, embeddings counted once [parameters]."""
    num_block_parameters: int | None = Field(default=None, ge=1)
    """Of these, the parameters of all blocks, which are what a harvest runs; None takes all but the embeddings [parameters]."""
    vocabulary: int | None = Field(default=None, ge=1)
    """Tokens that the model knows; None where nobody said so, and then a plan leaves logits out [tokens]."""
    context: int | None = Field(default=None, ge=1)
    """Longest block that the model reads; None where its config sets no limit [tokens]."""

    @property
    def words(self) -> int:
        """The vocabulary, or 0 where it is not known [tokens]."""
        return self.vocabulary or 0

    @property
    def in_blocks(self) -> int:
        """Parameters of all blocks [parameters]."""
        return self.num_block_parameters or max(1, self.num_parameters - self.words * self.d_model)

    def d_in(self, site: Site) -> int:
        """The width of what is read at a site."""
        return self.d_attention if site.kind == "attn_out" else self.d_model


class SaeGroup(Schema):
    """SAEs of equal sites, widths and budget: one row of Gemma Scope's table 1. Every combination is trained."""

    sites: tuple[SiteKind, ...] = Field(min_length=1)
    """Kinds of sites."""
    layers: tuple[int, ...] | None = None
    """Layers, from 0; None takes all."""
    widths: tuple[int, ...] = Field(min_length=1)
    """Numbers of latents [latents]."""
    sparsity_coefficients: tuple[float, ...] = ()
    """Lambdas, for SAEs without a target_l0; a larger one makes a sparser SAE [1]."""
    target_l0s: tuple[float, ...] = ()
    """L0s to aim at, in place of lambdas [latents]."""
    target_weight: float = Field(default=TARGET_WEIGHT, ge=0)
    """How firmly target_l0s are held [1]."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial decoders."""
    skips: tuple[bool, ...] = (False,)
    """Of transcoders: whether an affine map stands beside the latents; False True trains each without and with."""
    num_tokens: int = Field(ge=1)
    """Activation vectors that each SAE sees [tokens]."""
    saes_per_training_group: int | None = Field(default=None, ge=1)
    """SAEs of a site that train together, as many as fit a device; None: all, with other groups' of as many tokens [SAEs]."""
    latent_shards: int | None = Field(default=None, ge=1)
    """Processes that share the latents of each of these SAEs; None takes that of `train` [processes]."""
    replicas: int | None = Field(default=None, ge=1)
    """Copies of these processes, which share the rows of a batch; None takes that of `train` [processes]."""

    @model_validator(mode="after")
    def _check_sparsity(self) -> "SaeGroup":
        if bool(self.sparsity_coefficients) == bool(self.target_l0s):
            given = "neither is" if not self.target_l0s else "both are"
            raise ValueError(f"target_l0s or sparsity_coefficients: {given} given; give one of them, or make two groups")
        if any(self.skips) and not TRANSCODER_READS.keys() & set(self.sites):
            raise ValueError(f"skips={self.skips} with sites={self.sites}: only transcoders have a skip; leave it out")
        if not self.skips or len(set(self.skips)) < len(self.skips):
            raise ValueError(f"skips={self.skips}: expected (False,), (True,) or both")
        return self

    def train_settings(self, common: TrainSettings) -> TrainSettings:
        """How training groups of this group train, where others train as `common` says."""
        own = {name: getattr(self, name) for name in ("latent_shards", "replicas") if getattr(self, name) is not None}
        return TrainSettings.model_validate(common.model_dump() | own)


class HarvestSettings(Schema):
    """How activations are written; which ones follows from the groups."""

    num_tokens: int | None = Field(default=None, ge=1)
    """Rows kept per site; None keeps as many as the longest training wants, fewer are read several times [tokens]."""
    bucket_rows: int = Field(default=2**20, ge=1)
    """Rows shuffled together, which make one shard [rows]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""
    batch_blocks: int = Field(default=16, ge=1)
    """Blocks per forward pass [blocks]."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Disk that the shards may take; the harvest ends early, and whole, before they would take more. None: no limit [bytes]."""
    shuffle_bytes: int = Field(default=SHUFFLE_BYTES, ge=1)
    """Memory for shuffling [bytes]."""


class EvaluateSettings(Schema):
    """How much held-out text is evaluated."""

    num_sequences: int = Field(default=2048, ge=1)
    """Held-out blocks read [blocks]."""
    stride: int = Field(default=1, ge=1)
    """Of every so many held-out blocks one is read: more documents, where these are long [blocks]."""
    batch_blocks: int = Field(default=16, ge=1)
    """Blocks per forward pass [blocks]."""
    checkpoint_batches: int = Field(default=16, ge=1)
    """Batches between two saves of the sums [batches]."""
    saes_at_once: int | None = Field(default=None, ge=1)
    """SAEs held in memory at once; None holds all [SAEs]."""
    pca_rows: int = Field(default=2**17, ge=2)
    """Training rows behind the baselines [rows]."""
    uniformity_sequences: int = Field(default=16, ge=0)
    """Blocks on which the uniformity of latents' importance is measured; 0 leaves it out [blocks]."""
    baseline_sequences: int | None = Field(default=None, ge=0)
    """Blocks in which ablations and baselines are spliced, for their delta loss; 0 leaves it out. None takes so many that they
    cost at most a third of what the SAEs do [blocks]."""


Slice = Literal["widths", "splitting", "subsets", "precision", "probing"]
"""Comparisons over a whole suite that need nothing but the suite."""


class CompareSettings(Schema):
    """What is compared over the whole suite, beyond the scores of each SAE."""

    slices: tuple[Slice, ...] = ("widths", "splitting", "subsets", "precision", "probing")
    """The comparisons to make; two more follow from `instruction_tuned` and `random_weights`. Those of widths are left out where
    there is only one."""
    num_sequences: int | None = Field(default=None, ge=1)
    """Held-out blocks read for subsets, precision and transfer; None reads an eighth of those that scores rest on, so that all
    of these cost about as much as the scores [blocks]."""
    subsets: tuple[Subset, ...] = ()
    """Corpora to compare; none takes those that need no download."""
    splitting_sequences: int = Field(default=256, ge=1)
    """Held-out blocks on which firings of narrow and wide latents are counted [blocks]."""
    probe_tokens: int = Field(default=2**15, ge=100)
    """Tokens that probes are trained on, and as many that they are scored on [tokens]."""


class Control(Schema):
    """A smaller run of a sibling of the model, made only to be compared with."""

    model: ModelConfig
    """The sibling; it has the sizes of the recipe's own model."""
    text: TextConfig | None = None
    """Its text; None takes the recipe's."""
    groups: tuple[SaeGroup, ...] = ()
    """SAEs trained on it; none compares the recipe's own SAEs alone."""


class DescribeSettings(Schema):
    """How much text latents are described from."""

    num_sequences: int = Field(default=4096, ge=2)
    """Blocks read, half of them held out [blocks]."""
    batch_blocks: int = Field(default=16, ge=1)
    """Blocks per forward pass [blocks]."""
    raw_logits: bool = False
    """Also the tokens that each latent writes for and against without the norms' gains; the logit lens takes twice as long."""
    saes_at_once: int | None = Field(default=None, ge=1)
    """SAEs held in memory at once; None holds all [SAEs]."""


class ExplainSettings(Schema):
    """How much text labels are learnt from and scored on, and who writes them."""

    saes: str = "*"
    """Pattern of `<site>/layer_<L>/<SAE>` for the SAEs whose latents are labelled."""
    num_sequences: int = Field(default=512, ge=1)
    """Blocks of training documents [blocks]."""
    num_held_out_sequences: int = Field(default=512, ge=1)
    """Held-out blocks [blocks]."""
    batch_blocks: int = Field(default=16, ge=1)
    """Blocks per forward pass [blocks]."""
    saes_per_pass: int = Field(default=16, ge=1)
    """SAEs held in memory at once [SAEs]."""
    endpoint: EndpointConfig | None = None
    """A language model that labels a sample of the latents; None leaves it at offline labels."""
