"""A whole run as one config: the model, the text, the SAEs of the suite, and how each stage goes about it. Torch-free.

What a single stage needs is derived here, so that stages know nothing of one another.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.shards.norms import MAX_NORM, TAIL
from everyscope.base.bundled import public_name
from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema
from everyscope.describe.config import DescribeConfig
from everyscope.describe.explanations.config import ExplainConfig
from everyscope.evaluate.comparisons.config import (
    ComparisonConfig,
    PrecisionConfig,
    ProbingConfig,
    RandomModelConfig,
    SplittingConfig,
    SubsetsConfig,
    TransferConfig,
    WidthsConfig,
    built_in_subsets,
)
from everyscope.evaluate.config import EvaluateConfig
from everyscope.publish.config import PublishConfig
from everyscope.run.settings import (
    CompareSettings,
    Control,
    DescribeSettings,
    EvaluateSettings,
    ExplainSettings,
    HarvestSettings,
    ModelShape,
    SaeGroup,
)
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.presets import for_transcoders
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import TRANSCODER_READS, Site, places_of, sites_of
from everyscope.sites.passes import blocks_at_once
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainConfig, TrainSettings, sae_name

LIVE_HOLD_SECONDS = 60.0
"""How long, without a disk, a trainer that lags may keep rows from being replaced: computing them again is costly [s]."""
LIVE_CHUNKS = 8
"""The least into which a bucket is cut there, where chunks would not be larger than usual [chunks]."""
CAPTURED_BYTES = 4 * 2 * 4
"""What a GPU holds for each layer and coordinate of a token: four places, in two passes, in float32; one pass is on its way to
the host while the next is made [bytes]."""
LOGIT_BYTES = 16
"""What an evaluation holds for each logit: the clean and the spliced model's, in both number formats [bytes]."""
UNAIMED_L0 = 100
"""L0 near which an SAE stands for its site and width where the recipe aims at none, as in Gemma Scope [latents]."""


class RunConfig(Schema):
    """Everything from text to suite."""

    name: str
    """The run's name; its folder is `runs/<name>` unless --out says otherwise."""
    title: str
    """The suite's name for people."""
    model: ModelConfig
    """The language model."""
    shape: ModelShape | None = None
    """The model's sizes; None reads them from the model's config.json."""
    public_model: str | None = None
    """The model's name in the model card and on pages; None takes model.name, of a local folder its last part."""
    text: TextConfig
    """The corpus, its packing and its split."""
    groups: tuple[SaeGroup, ...] = Field(min_length=1)
    """Which SAEs make the suite."""
    preset: SaePreset = SaePreset()
    """How each SAE is trained; transcoders by the same but for `encoder_follows`, which they cannot have."""
    harvest: HarvestSettings = HarvestSettings()
    """How activations are written."""
    train: TrainSettings = TrainSettings()
    """How training groups are trained."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """How SAEs are scored."""
    compare: CompareSettings = CompareSettings()
    """What is compared over the whole suite."""
    instruction_tuned: Control | None = None
    """The instruction-tuned sibling on which the SAEs are evaluated too, beside SAEs of its own; None leaves that out."""
    random_weights: Control | None = None
    """The same architecture with random weights, whose SAEs are a baseline; None leaves that out."""
    describe: DescribeSettings = DescribeSettings()
    """How latents are described."""
    explain: ExplainSettings = ExplainSettings()
    """How latents are labelled."""
    max_norm: float | None = Field(default=MAX_NORM, ge=TAIL)
    """Rows whose norm is above this many times their site's median norm are left out of training, metrics and descriptions; None
    keeps all, as in the paper [1]."""
    seed: int = Field(default=0, ge=0)
    """Seed of the harvest's shuffle."""
    sized_for_hours: float | None = None
    """The time that tokens and blocks were chosen for, where a run was made from a model's name; for the record alone [h]."""

    @property
    def sizes(self) -> ModelShape:
        """The model's sizes; ConfigError where they have not been read yet."""
        if self.shape is None:
            raise ConfigError(
                f"shape of {self.model.name!r} is not known; give it, or use everyscope.run.model.with_shape(config)"
            )
        return self.shape

    def sites(self, group: SaeGroup) -> tuple[Site, ...]:
        """The sites of one group; ConfigError for a layer that the model does not have."""
        return sites_of(group.sites, group.layers, self.sizes.num_layers)

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Every site of the suite, once, in order of layer."""
        return _in_order({site for group in self.groups for site in self.sites(group)})

    @property
    def all_places(self) -> tuple[Site, ...]:
        """Every place that is harvested: the sites of SAEs, and what transcoders read and write."""
        return _in_order(places_of(self.all_sites))

    def tokens_of(self, place: Site) -> int:
        """Rows to keep for a place: what its longest training wants, or the harvest's own limit [tokens]."""
        wanted = max(group.num_tokens for group in self.groups if place in places_of(self.sites(group)))
        return wanted if self.harvest.num_tokens is None else min(wanted, self.harvest.num_tokens)

    def _blocks(self, least: int, logits: bool = False) -> int:
        """Blocks in a pass of the model: `least`, or as many as fill its device.

        By the model alone, and not by the sites: blocks decide the last bits, so that scores are known by them, and a site more
        must not make those of the others again.
        """
        sizes = self.sizes
        kept = CAPTURED_BYTES * sizes.d_model * sizes.num_layers + (LOGIT_BYTES * sizes.words if logits else 0)
        return blocks_at_once(least, self.text.context, self.model.device, kept)

    def _filled(self, settings: EvaluateSettings | DescribeSettings | ExplainSettings, logits: bool = False) -> dict[str, Any]:
        """A stage's settings, with as many blocks in a pass as its device takes."""
        return settings.model_dump() | {"batch_blocks": self._blocks(settings.batch_blocks, logits)}

    def harvest_config(self, out: Path) -> HarvestConfig:
        """The one pass of the model that feeds all groups."""
        return HarvestConfig(
            model=self.model,
            text=self.text,
            sites=self.all_places,
            num_tokens=max(self.tokens_of(place) for place in self.all_places),
            bucket_rows=self.harvest.bucket_rows,
            dtype=self.harvest.dtype,
            batch_blocks=self._blocks(self.harvest.batch_blocks),
            seed=self.seed,
            max_bytes=self.harvest.max_bytes,
            shuffle_bytes=self.harvest.shuffle_bytes,
            out=out / "shards",
        )

    def live_config(self, out: Path) -> ServeConfig:
        """A server of what the harvest would write. Laggards are waited for, and a bucket has chunks enough that what trainers
        ask ahead seldom lies in two.
        """
        bucket_rows = min(self.harvest.bucket_rows, max(self.tokens_of(place) for place in self.all_places))
        usual = ServeConfig(shards=out / "live", hold_seconds=LIVE_HOLD_SECONDS)
        return usual.model_copy(update={"chunk_rows": max(1, min(usual.chunk_rows, bucket_rows // LIVE_CHUNKS))})

    def train_configs(
        self, out: Path, source: str | None = None, order: Literal["fixed", "any"] = "fixed", tls_roots: Path | None = None
    ) -> tuple[TrainConfig, ...]:
        """One training group per site and token budget, or more where groups say so, in order of layer; ConfigError where two
        SAEs would have the same folder.

        `source` is where all sites are served, as flight://HOST:PORT, if activations do not come from the run's own shards.
        Rows of two sites belong together in fixed order alone, so transcoders take that.
        """
        training_groups: dict[tuple[Site, int, TrainSettings, tuple[int, int] | None], list[SaeConfig]] = {}
        for site in self.all_sites:
            for number, group in enumerate(self.groups):
                settings = group.train_settings(self.train)
                for place, sae in enumerate(self.saes_of(group, site) if site in self.sites(group) else []):
                    part = None if group.saes_per_training_group is None else (number, place // group.saes_per_training_group)
                    training_groups.setdefault((site, group.num_tokens, settings, part), []).append(sae)
        names = Counter((site, sae_name(sae)) for (site, *_), saes in training_groups.items() for sae in saes)
        for (site, name), count in names.items():
            if count > 1:
                raise ConfigError(
                    f"groups: {count} SAEs named {name} at {site}; change widths, target_l0s, sparsity_coefficients or seeds"
                )
        return tuple(
            TrainConfig(
                **self._sides(site, out / "shards", source),
                order=order if site.inputs == site.outputs else "fixed",
                tls_roots=tls_roots,
                saes=tuple(saes),
                num_tokens=num_tokens,
                max_norm=self.max_norm,
                settings=settings,
                out=out / "train" / site.folder,
            )
            for (site, num_tokens, settings, _), saes in training_groups.items()
        )

    def _sides(self, site: Site, shards: Path, source: str | None) -> dict[str, Any]:
        """What is read at a site, and what is written where that is another place: TrainConfig's fields."""
        reads, writes = site.inputs[0], site.outputs[0]
        fields: dict[str, Any] = {"site": reads, "shards": shards / reads.folder}
        fields["source"] = source and f"{source.rstrip('/')}/{reads.folder}"
        if writes == reads:
            return fields
        target_source = source and f"{source.rstrip('/')}/{writes.folder}"
        return fields | {"target": writes, "target_shards": shards / writes.folder, "target_source": target_source}

    def saes_of(self, group: SaeGroup, site: Site | None = None) -> list[SaeConfig]:
        """The SAEs that a group wants at one of its sites, by default at its first kind of them."""
        is_transcoder = (group.sites[0] if site is None else site.kind) in TRANSCODER_READS
        recipe, skips = (for_transcoders(self.preset), group.skips) if is_transcoder else (self.preset, (False,))
        sparsities: list[dict[str, Any]] = [{"target_l0": l0, "target_weight": group.target_weight} for l0 in group.target_l0s]
        sparsities += [{"sparsity_coefficient": coefficient} for coefficient in group.sparsity_coefficients]
        return [
            SaeConfig(width=width, seed=seed, preset=recipe, skip=skip, **sparsity)
            for width in group.widths
            for skip in skips
            for sparsity in sparsities
            for seed in group.seeds
        ]

    @property
    def canonical_l0(self) -> float:
        """The L0 whose nearest SAE stands for its site and width: the middle of those aimed at, or UNAIMED_L0 [latents]."""
        targets = sorted({target for group in self.groups for target in group.target_l0s})
        return targets[len(targets) // 2] if targets else UNAIMED_L0

    def parts(self, out: Path) -> Iterator[tuple["RunConfig", Path]]:
        """This run and its controls that train SAEs, each with its folder."""
        yield self, out
        for name in ("instruction_tuned", "random_weights"):
            control: Control | None = getattr(self, name)
            if control is not None and control.groups:
                yield self.of_control(name, control), out / "controls" / name

    def of_control(self, name: str, control: Control) -> "RunConfig":
        """The run that trains a control's SAEs."""
        changes = {
            "name": f"{self.name}_{name}",
            "model": control.model,
            "text": control.text or self.text,
            "groups": control.groups,
            "instruction_tuned": None,
            "random_weights": None,
        }
        return self.model_copy(update=changes)

    def evaluate_config(self, out: Path, has_shards: bool = True) -> EvaluateConfig:
        """The evaluation of everything trained, on the held-out documents of the run's own text.

        A run that was trained from servers has no shards; then the baselines are fitted on the text's training documents.
        """
        return EvaluateConfig(
            model=self.model,
            text=self.text,
            shards=out / "shards" if has_shards else None,
            trained=out / "train",
            out=out / "scores",
            seed=self.seed,
            max_norm=self.max_norm,
            **self._filled(self.evaluate, logits=True),
        )

    def comparison_configs(self, out: Path, has_shards: bool = True) -> list[ComparisonConfig]:
        """The comparisons over the suite that the recipe asks for, once everything is evaluated."""
        common: dict[str, Any] = {"evaluate": self.evaluate_config(out, has_shards), "canonical_l0": self.canonical_l0}
        settings, controls = self.compare, {config.name: (config, folder) for config, folder in self.parts(out)}
        again: dict[str, Any] = common | {"num_sequences": settings.num_sequences}
        wanted: dict[str, ComparisonConfig] = {
            "widths": WidthsConfig(**common),
            "splitting": SplittingConfig(**common, num_sequences=settings.splitting_sequences),
            "subsets": SubsetsConfig(**again, subsets=settings.subsets or built_in_subsets(self.text)),
            "precision": PrecisionConfig(**again),
            "probing": ProbingConfig(
                **common, text=self._python_text(), train_tokens=settings.probe_tokens, test_tokens=settings.probe_tokens
            ),
        }
        configs = [wanted[name] for name in settings.slices if name not in self.slices_left_out]
        if self.instruction_tuned is not None:
            tuned = controls.get(f"{self.name}_instruction_tuned")
            configs.append(
                TransferConfig(
                    **again,
                    tuned=self.instruction_tuned.model,
                    text=self.instruction_tuned.text or self.text,
                    tuned_evaluation=tuned and tuned[0].evaluate_config(tuned[1], has_shards),
                )
            )
        random = controls.get(f"{self.name}_random_weights")
        if random is not None:
            configs.append(RandomModelConfig(**common, random_evaluation=random[0].evaluate_config(random[1], has_shards)))
        return configs

    @property
    def slices_left_out(self) -> dict[str, str]:
        """Comparisons that the recipe asks for and this run cannot make, with the reason."""
        found: dict[str, str] = {}
        if len({width for group in self.groups for width in group.widths}) < 2:
            found |= dict.fromkeys(("widths", "splitting"), "all SAEs have one width")
        if not self.text.source.startswith("standard_library"):
            found["probing"] = "its classes are those of Python's tokens, the text is not Python"
            if not self.compare.subsets:
                found["subsets"] = "the built-in corpora are Python and arithmetic, the text is not; name others in subsets"
        return {name: reason for name, reason in found.items() if name in self.compare.slices}

    def _python_text(self) -> TextConfig:
        """Python sources, whose tokens have classes of their own, packed as the run's text."""
        return TextConfig(source="standard_library", **self.text.packing)

    def describe_config(self, out: Path) -> DescribeConfig:
        """The description of every latent, from training and held-out documents."""
        return DescribeConfig(
            model=self.model,
            text=self.text,
            trained=out / "train",
            scores=out / "scores",
            out=out / "descriptions",
            seed=self.seed,
            **self._filled(self.describe),
        )

    def explain_config(self, out: Path) -> ExplainConfig:
        """The labels of every latent, learnt on training documents and scored on held-out ones."""
        return ExplainConfig(
            model=self.model,
            text=self.text,
            trained=out / "train",
            out=out / "descriptions",
            seed=self.seed,
            **self._filled(self.explain),
        )

    def publish_config(self, out: Path) -> PublishConfig:
        """The suite made of the run's SAEs and scores."""
        return PublishConfig(
            trained=out / "train",
            scores=out / "scores",
            descriptions=out / "descriptions",
            out=out / "suite",
            title=self.title,
            model=self.public_model or public_name(self.model.name),
            canonical_l0=self.canonical_l0,
        )


def _in_order(sites: Iterable[Site]) -> tuple[Site, ...]:
    """By layer, the embedding first."""
    return tuple(sorted(sites, key=lambda site: (site.kind != "embed", site.layer, site.kind)))
