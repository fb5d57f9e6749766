"""One training group: all SAEs of one site, or all transcoders between two, that see the same batches for the same number of
tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from everyscope.activations.shards.norms import MAX_NORM, TAIL
from everyscope.base.errors import ConfigError
from everyscope.base.ids import content_id
from everyscope.base.schema import Schema
from everyscope.sae.config import SaeConfig
from everyscope.sites.names import Site, site_of

EngineName = Literal["auto", "dense", "pairs"]
"""auto takes pairs where there are kernels for the device; these step densely by themselves while the code is dense."""
Precision = Literal["auto", "float32", "bfloat16"]
"""Of products and gathers; weights, Adam's means and all sums are float32 in any case."""
Products = Literal["float32", "bfloat16"]
SinkName = Literal["wandb", "tensorboard"]
SINKS: tuple[SinkName, ...] = get_args(SinkName)
"""Where metrics can go besides metrics.jsonl; each is an optional package."""

PLACES = ("shards", "target_shards", "source", "target_source", "order", "tls_roots", "out")
"""Fields that say where things are, and not what is trained."""


def products_of(device: str, engine: EngineName, precision: Precision, *, has_skip: bool = False) -> Products:
    """The precision that steps have on this device by this engine; ConfigError where it has no kernels for the one asked for.

    On a CPU bfloat16 concerns the products of a skip alone.
    """
    kind = device.partition(":")[0]
    has_kernels = kind == "cuda" and engine != "dense"
    if precision == "bfloat16" and not has_kernels:
        raise ConfigError(
            f"precision=bfloat16 with device={device}, engine={engine}: bfloat16 has kernels for device=cuda with engine=auto or "
            "pairs; choose these, or precision=float32"
        )
    rounds_skips = kind == "cpu" and engine != "dense" and has_skip
    return "bfloat16" if (has_kernels or rounds_skips) and precision != "float32" else "float32"


class TrainSettings(Schema):
    """How every training group of a run is trained; what is trained is in the recipe's groups."""

    batch_rows: int = Field(default=4096, ge=1)
    """Activation vectors in a batch [rows]."""
    checkpoint_steps: int = Field(default=5000, ge=1)
    """Steps between two checkpoints [steps]."""
    log_steps: int = Field(default=100, ge=1)
    """Steps between two lines in metrics.jsonl [steps]."""
    report_to: tuple[SinkName, ...] = ()
    """Where these lines go too: wandb, tensorboard (its files lie beside the trained SAEs)."""
    device: str = "cpu"
    """Torch device that SAEs train on."""
    engine: EngineName = "auto"
    """How a step is computed; auto takes pairs where there are kernels for the device."""
    precision: Precision = "auto"
    """Of a step's products: auto takes bfloat16 where there are kernels for it, on CUDA with engine auto or pairs, else
    float32; on a CPU, bfloat16 for a transcoder's skip alone."""
    latent_shards: int = Field(default=1, ge=1)
    """Processes that share the latents of every SAE, for SAEs wider than one device [processes]."""
    replicas: int = Field(default=1, ge=1)
    """Copies of these processes, which share the rows of a batch [processes]."""

    @model_validator(mode="after")
    def _check_ranks(self) -> "TrainSettings":
        if self.batch_rows % self.replicas:
            raise ValueError(f"batch_rows={self.batch_rows} does not divide by replicas={self.replicas}; choose a multiple")
        if self.ranks > 1 and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(
                f"latent_shards={self.latent_shards}, replicas={self.replicas}: device={self.device} has one; choose cpu or cuda"
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> "TrainSettings":
        try:
            products_of(self.device, self.engine, self.precision)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def products(self) -> Products:
        """The precision that steps have."""
        return products_of(self.device, self.engine, self.precision)

    @property
    def ranks(self) -> int:
        """Processes that train a training group together."""
        return self.latent_shards * self.replicas


class TrainConfig(Schema):
    """A training group: its activations, its SAEs and its length."""

    site: Site
    """Where the activations are from."""
    target: Site | None = Field(default=None, exclude_if=lambda value: value is None)
    """What transcoders predict from the activations of `site`; None, or the site itself, trains SAEs, which reconstruct these."""
    shards: Path
    """The site's folder of shards, written by `everyscope harvest`."""
    target_shards: Path | None = Field(default=None, exclude_if=lambda value: value is None)
    """The target's folder of shards, of the same harvest."""
    source: str | None = None
    """Where activations come from instead: an address of shards, or flight://HOST:PORT/SITE of activation servers."""
    target_source: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The same of the target."""
    order: Literal["fixed", "any"] = "fixed"
    """Of servers' chunks: fixed is the order of the shards, any takes what the servers have in memory and keeps a journal."""
    tls_roots: Path | None = None
    """Certificates to trust servers by, PEM."""
    saes: tuple[SaeConfig, ...] = Field(min_length=1)
    """The SAEs to train, all on the same batches."""
    num_tokens: int = Field(ge=1)
    """Activation vectors that each SAE sees; the shards are read again where they hold fewer [rows]."""
    max_norm: float | None = Field(default=MAX_NORM, ge=TAIL)
    """Rows whose norm is above this many times the site's median norm are left out; None keeps all, as in the paper [1]."""
    settings: TrainSettings = TrainSettings()
    """Batch, checkpoints, logging, device."""
    out: Path
    """Folder for this site's trained SAEs, checkpoints and metrics."""

    @model_validator(mode="after")
    def _check_names(self) -> "TrainConfig":
        names = [sae_name(config) for config in self.saes]
        if len(set(names)) < len(names):
            raise ValueError(
                f"saes={names}: two SAEs of a training group share width, sparsity (or target_l0) and seed; change one"
            )
        if self.order == "any" and not (self.source or "").startswith("flight"):
            raise ValueError(f"order='any' with source={self.source!r}: only servers have it; give flight://HOST:PORT/SITE")
        if self.order == "any" and self.settings.ranks > 1:
            raise ValueError(
                f"order='any' with {self.settings.ranks} processes: each would take other rows; choose order='fixed'"
            )
        self._check_target()
        narrowest = min(config.width for config in self.saes)
        if self.settings.latent_shards > narrowest:
            raise ValueError(
                f"settings.latent_shards={self.settings.latent_shards}: an SAE of width {narrowest} has not so many latents"
            )
        if self.num_tokens < self.settings.batch_rows:
            raise ValueError(f"num_tokens={self.num_tokens} is less than one batch of batch_rows={self.settings.batch_rows}")
        return self

    def _check_target(self) -> None:
        """What transcoders need, and what is theirs alone."""
        check_configs(self.saes, self.writes is not None)
        if self.writes is None:
            return
        if site_of(self.site, self.writes) is None:
            raise ValueError(
                f"site={self.site}, target={self.writes}: no transcoder's pair; read mlp_in and write mlp_out of a layer"
            )
        if self.target_shards is None or (self.source is None) != (self.target_source is None):
            raise ValueError(f"target={self.writes}: give target_shards, and target_source where source is given")
        if self.order == "any":
            raise ValueError(
                "order='any' with a target: each site's rows would come in an order of their own; choose order='fixed'"
            )

    @property
    def writes(self) -> Site | None:
        """The target, where it is another place than the site."""
        return None if self.target == self.site else self.target

    @property
    def coder_site(self) -> Site:
        """Where what is trained sits: the site of SAEs, that of transcoders."""
        coder_site = site_of(self.site, self.writes or self.site)
        assert coder_site is not None, "checked when the config was built"
        return coder_site

    @property
    def products(self) -> Products:
        """The precision that steps have."""
        settings, has_skip = self.settings, any(sae.skip for sae in self.saes)
        return products_of(settings.device, settings.engine, settings.precision, has_skip=has_skip)

    @property
    def steps(self) -> int:
        """Updates of each SAE [steps]."""
        return self.num_tokens // self.settings.batch_rows

    def record(self) -> dict[str, Any]:
        """All fields but folders, as JSON values, so that a run's folder may be moved."""
        return {name: value for name, value in self.as_json().items() if name not in PLACES}

    @property
    def group_id(self) -> str:
        """An identity of what is trained and how, independent of folders and log intervals."""
        what = [[config.as_json() for config in self.saes], self.num_tokens, self.settings.batch_rows, self.max_norm]
        return content_id([*self._sides, what])

    def identity_of(self, sae: SaeConfig, source: str) -> str:
        """An identity of one of the SAEs, trained on activations of identity `source`: the same in whatever group it trains."""
        what = [sae.as_json(), self.num_tokens, self.settings.batch_rows, self.max_norm]
        return content_id([*self._sides, what, source])

    @property
    def _sides(self) -> list[str]:
        return [self.site.folder] if self.writes is None else [self.site.folder, self.writes.folder]


def sae_name(config: SaeConfig) -> str:
    """The folder name of a trained SAE within its site."""
    sparsity = f"sparsity_{config.sparsity_weight:g}" if config.target_l0 is None else f"l0_{config.target_l0:g}"
    return f"width_{config.width}_{sparsity}_seed_{config.seed}" + ("_skip" if config.skip else "")


def check_configs(configs: Sequence[SaeConfig], are_transcoders: bool) -> None:
    """ConfigError where a config is of SAEs and the training group of transcoders, or the other way round."""
    for config in configs:
        if config.skip and not are_transcoders:
            raise ConfigError("skip=True of an SAE: it would copy its input; only transcoders, which have a target, have a skip")
        if are_transcoders and config.preset.encoder_follows:
            raise ConfigError(
                "encoder_follows=True of a transcoder: its encoder and its directions live in different spaces; set it to False, "
                "or take the preset fast_transcoder"
            )
