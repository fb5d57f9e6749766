"""A whole run as one config: the model, the text, the SAEs of the suite, and how each stage goes about it. Torch-free.

What a single stage needs is derived here, so that stages know nothing of one another.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema
from everyscope.evaluate.config import EvaluateConfig
from everyscope.harvest.config import HarvestConfig
from everyscope.publish.config import PublishConfig
from everyscope.sae.config import SaeConfig, SaeRecipe
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site, SiteKind, sites_of
from everyscope.text.config import TextConfig
from everyscope.train.config import BankSettings, TrainConfig, sae_name


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

    def d_in(self, site: Site) -> int:
        """The width of a site."""
        return self.d_attention if site.kind == "attn_out" else self.d_model


class SaeGroup(Schema):
    """SAEs of equal sites, widths and budget: one row of Gemma Scope's table 1. Every combination is trained."""

    sites: tuple[SiteKind, ...] = Field(min_length=1)
    """Kinds of sites."""
    layers: tuple[int, ...] | None = None
    """Layers, from 0; None takes all."""
    widths: tuple[int, ...] = Field(min_length=1)
    """Numbers of latents [latents]."""
    sparsity_coefficients: tuple[float, ...] = Field(min_length=1)
    """Lambdas; more makes sparser SAEs. With target_l0s, how firmly these are held [1]."""
    target_l0s: tuple[float | None, ...] = (None,)
    """L0s to aim at; None has no target, so that the lambda alone decides [latents]."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial decoders."""
    num_tokens: int = Field(ge=1)
    """Activation vectors that each SAE sees [tokens]."""


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


class EvaluateSettings(Schema):
    """How much held-out text scores rest on."""

    num_sequences: int = Field(default=2048, ge=1)
    """Held-out blocks read [blocks]."""
    batch_blocks: int = Field(default=16, ge=1)
    """Blocks per forward pass [blocks]."""
    checkpoint_batches: int = Field(default=16, ge=1)
    """Batches between two saves of the sums [batches]."""
    pca_rows: int = Field(default=2**17, ge=2)
    """Training rows behind the PCA baseline [rows]."""


class RunConfig(Schema):
    """Everything from text to suite."""

    name: str
    """The run's name; its folder is runs/<name> unless --out says otherwise."""
    title: str
    """The suite's name for people."""
    model: ModelConfig
    """The language model."""
    shape: ModelShape
    """The model's sizes."""
    text: TextConfig
    """The corpus, its packing and its split."""
    groups: tuple[SaeGroup, ...] = Field(min_length=1)
    """Which SAEs make the suite."""
    recipe: SaeRecipe = SaeRecipe()
    """How each SAE is trained."""
    harvest: HarvestSettings = HarvestSettings()
    """How activations are written."""
    train: BankSettings = BankSettings()
    """How banks are trained."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """How SAEs are scored."""
    seed: int = Field(default=0, ge=0)
    """Seed of the harvest's shuffle."""

    def sites(self, group: SaeGroup) -> tuple[Site, ...]:
        """The sites of one group; ConfigError for a layer that the model does not have."""
        return sites_of(group.sites, group.layers, self.shape.num_layers)

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Every site of the suite, once, in order of layer."""
        found = {site for group in self.groups for site in self.sites(group)}
        return tuple(sorted(found, key=lambda site: (site.kind != "embed", site.layer, site.kind)))

    def tokens_of(self, site: Site) -> int:
        """Rows to keep for a site: what its longest training wants, or the harvest's own limit [tokens]."""
        wanted = max(group.num_tokens for group in self.groups if site in self.sites(group))
        return wanted if self.harvest.num_tokens is None else min(wanted, self.harvest.num_tokens)

    def harvest_config(self, out: Path) -> HarvestConfig:
        """The one pass of the model that feeds all groups."""
        return HarvestConfig(
            model=self.model,
            text=self.text,
            sites=self.all_sites,
            num_tokens=max(self.tokens_of(site) for site in self.all_sites),
            bucket_rows=self.harvest.bucket_rows,
            dtype=self.harvest.dtype,
            batch_blocks=self.harvest.batch_blocks,
            seed=self.seed,
            out=out / "shards",
        )

    def train_configs(self, out: Path) -> tuple[TrainConfig, ...]:
        """One bank per site and token budget, in order of layer; ConfigError where two groups ask for the same SAE."""
        banks: dict[tuple[Site, int], list[SaeConfig]] = {}
        for site in self.all_sites:
            for group in (group for group in self.groups if site in self.sites(group)):
                banks.setdefault((site, group.num_tokens), []).extend(self.saes_of(group))
        names = [(site, sae_name(sae)) for (site, _), saes in banks.items() for sae in saes]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled:
            raise ConfigError(f"{doubled[0]}: {doubled[1]} is asked for twice; mend groups")
        return tuple(
            TrainConfig(
                site=site,
                shards=out / "shards" / site.folder,
                saes=tuple(saes),
                num_tokens=num_tokens,
                settings=self.train,
                out=out / "train" / site.folder,
            )
            for (site, num_tokens), saes in banks.items()
        )

    def saes_of(self, group: SaeGroup) -> list[SaeConfig]:
        """The SAEs that a group wants at each of its sites."""
        return [
            SaeConfig(width=width, sparsity_coefficient=coefficient, target_l0=target, seed=seed, recipe=self.recipe)
            for width in group.widths
            for coefficient in group.sparsity_coefficients
            for target in group.target_l0s
            for seed in group.seeds
        ]

    def evaluate_config(self, out: Path) -> EvaluateConfig:
        """The evaluation of everything trained, on the held-out documents of the run's own text."""
        settings = self.evaluate
        return EvaluateConfig(
            model=self.model,
            text=self.text,
            shards=out / "shards",
            trained=out / "train",
            out=out / "scores",
            num_sequences=settings.num_sequences,
            batch_blocks=settings.batch_blocks,
            checkpoint_batches=settings.checkpoint_batches,
            pca_rows=settings.pca_rows,
        )

    def publish_config(self, out: Path) -> PublishConfig:
        """The suite made of the run's SAEs and scores."""
        return PublishConfig(
            trained=out / "train", scores=out / "scores", out=out / "suite", title=self.title, model=self.model.name
        )
