"""What is compared over a whole suite. Every comparison stands on an evaluation that has been made, and adds one slice to it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from everyscope.base.schema import Schema
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig, TextSource

BLOCKS_PER_VARIANT, LEAST_BLOCKS = 8, 8
"""By default a condition reads one of this many of the scores' blocks, and at least this many [blocks]."""
SLICES, WORK = "slices", "comparisons"
"""Folders below the scores: what is published, and the scores that it was made from."""


class ComparisonConfig(Schema):
    """What all comparisons need."""

    evaluate: EvaluateConfig
    """The evaluation whose scores are compared, and whose model and text are used again."""
    canonical_l0: float = Field(default=100, gt=0)
    """Of the SAEs of one site and width, the one of L0 nearest to this stands for all [latents]."""

    @property
    def slices(self) -> Path:
        """Where slices go."""
        return self.evaluate.out / SLICES

    @property
    def work(self) -> Path:
        """Where what slices are made from is kept."""
        return self.evaluate.out / WORK


class VariantsConfig(ComparisonConfig):
    """What comparisons need that evaluate SAEs again, under other conditions."""

    num_sequences: int | None = Field(default=None, ge=1)
    """Held-out blocks read under each condition; None reads an eighth of the evaluation's, 8 at least [blocks]."""

    @property
    def base(self) -> EvaluateConfig:
        """The evaluation with this many blocks."""
        num_sequences = self.num_sequences
        if num_sequences is None:
            num_sequences = max(min(LEAST_BLOCKS, self.evaluate.num_sequences), self.evaluate.num_sequences // BLOCKS_PER_VARIANT)
        return self.evaluate.model_copy(update={"num_sequences": num_sequences})


class WidthsConfig(ComparisonConfig):
    """Fidelity against width at equal L0."""

    l0s: tuple[float, ...] | None = None
    """L0s to compare at; None takes `num_l0s` that all widths of a site have in common [latents]."""
    num_l0s: int = Field(default=3, ge=1)
    """Common L0s of a site, even in their logarithm from the lowest to the highest [1]."""


class SplittingConfig(ComparisonConfig):
    """Which latents of a wider SAE a narrower one's split into."""

    null: Literal["isotropic", "covariance"] = "covariance"
    """Random dictionaries to compare with: directions without preference, or with the mean and covariance of the wide decoder's,
    which is the stricter of the two wherever all decoders point into the same few dimensions."""
    null_quantile: float = Field(default=0.999, gt=0, lt=1)
    """A latent is related to its nearest one if their cosine exceeds this quantile of the random latents' [1]."""
    null_latents: int = Field(default=2**14, ge=100)
    """Random latents behind that quantile and the p-values [latents]."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random dictionaries."""
    num_sequences: int = Field(default=256, ge=1)
    """Held-out blocks on which firings are counted; fewer where the evaluation reads fewer [blocks]."""
    pairs_at_once: int = Field(default=32, ge=1)
    """Pairs of SAEs held in memory for one pass over the text [pairs]."""


class TransferConfig(VariantsConfig):
    """SAEs of a base model on its instruction-tuned sibling."""

    tuned: ModelConfig
    """The instruction-tuned model."""
    text: TextConfig
    """Its text, with the turns that it expects."""
    tuned_evaluation: EvaluateConfig | None = None
    """An evaluation of SAEs that were trained on the tuned model, to set beside; None where there are none."""
    is_canonical_only: bool = True
    """Compare the canonical SAE of each site and width; else all of them."""


class Subset(Schema):
    """One named corpus."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    """Its name, unique among the subsets: letters, digits, space, dot, underscore, hyphen."""
    text: TextConfig
    """Where it comes from; only its held-out documents are read."""
    description: str = ""
    """What it is, in words, for captions."""


class SubsetsConfig(VariantsConfig):
    """The same SAEs on several corpora."""

    subsets: tuple[Subset, ...] = Field(min_length=1)
    """The corpora; `built_in_subsets` gives those that need no download."""

    @model_validator(mode="after")
    def _check(self) -> "SubsetsConfig":
        names = [subset.name for subset in self.subsets]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"subsets: {doubled!r} is named twice; give each corpus a name of its own")
        return self


def built_in_subsets(text: TextConfig) -> tuple[Subset, ...]:
    """Corpora that every machine has, in blocks as those of `text`."""

    def subset(name: str, source: TextSource, description: str) -> Subset:
        return Subset(
            name=name,
            text=TextConfig(source=source, **text.packing),
            description=description,
        )

    return (
        subset("code", "standard_library", "sources of the Python standard library"),
        subset("docstrings", "standard_library_docstrings", "English prose: docstrings of the Python standard library"),
        subset("arithmetic", "arithmetic", "generated sums, differences, products, quotients and comparisons"),
    )


class PrecisionConfig(VariantsConfig):
    """The same SAEs and the same model in shorter number formats."""

    sae_dtypes: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("float32", "bfloat16", "int8")
    """Number formats of the SAE's weights."""
    model_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Number formats of the language model. float32 is measured with every format of SAEs, another with SAEs in float32 and
    in the same format, as in Gemma Scope."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The formats of SAE and model that are measured together."""
        return [
            (sae, model)
            for model in self.model_dtypes
            for sae in self.sae_dtypes
            if model == "float32" or sae in ("float32", model)
        ]


class ProbingConfig(ComparisonConfig):
    """How well a few latents predict a token's class."""

    text: TextConfig | None = None
    """Where Python sources come from; None takes the evaluation's text."""
    labels: Path | None = None
    """A .jsonl of your own: in each line `text`, and `labels` with one name or null per character. None labels Python sources
    with the classes of their own tokens."""
    ks: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Numbers of latents that a probe may use [latents]."""
    num_seeds: int = Field(default=3, ge=3)
    """Draws of training documents [1]."""
    train_tokens: int = Field(default=2**15, ge=100)
    """Training tokens, of which each seed draws the half of the documents [tokens]."""
    test_tokens: int = Field(default=2**15, ge=100)
    """Held-out tokens that probes are scored on [tokens]."""
    blocks_per_document: int = Field(default=4, ge=1)
    """Blocks taken of one document at most, so that intervals rest on many [blocks]."""
    min_positives: int = Field(default=20, ge=1)
    """Labels that fewer tokens have, in training or held-out text, are left out [tokens]."""
    ridge: float = Field(default=1e-3, gt=0)
    """Weight of half the squared coefficients of standardised features, beside the mean loss [nats]."""
    resamples: int = Field(default=1000, ge=100)
    """Resamplings of the held-out documents behind an interval [1]."""
    level: float = Field(default=0.95, gt=0, lt=1)
    """Share of them that an interval holds [1]."""
    sites_at_once: int = Field(default=12, ge=1)
    """Sites whose activations are held in memory at once [sites]."""

    @property
    def packing(self) -> TextConfig:
        """The text whose context and split are used; also its documents, where no labels are given."""
        return self.evaluate.text if self.text is None else self.text

    @model_validator(mode="after")
    def _check(self) -> "ProbingConfig":
        if self.labels is not None and self.text is not None:
            raise ValueError(f"labels={str(self.labels)!r} and text are both given: labels bring their own text; leave one out")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks={self.ks}: expected different numbers of latents, each 1 or more, as 1 2 5")
        return self


class RandomModelConfig(ComparisonConfig):
    """SAEs trained on the same model with random weights, as a baseline for those of the real one."""

    random_evaluation: EvaluateConfig
    """The evaluation of the SAEs of the untrained model, made already."""
