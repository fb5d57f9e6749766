"""One bank: all SAEs of one site that see the same batches for the same number of tokens."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from everyscope.activations.shards.norms import MAX_NORM, TAIL
from everyscope.base.ids import content_id
from everyscope.base.schema import Schema
from everyscope.sae.config import SaeConfig
from everyscope.sites.names import Site

EngineName = Literal["auto", "dense", "pairs"]
"""auto takes pairs where there are kernels for the device; these step densely by themselves while the code is dense."""
Precision = Literal["auto", "float32", "bfloat16"]
"""Of products and gathers; weights, Adam's means and all sums are float32 in any case."""
SinkName = Literal["wandb", "tensorboard"]
SINKS: tuple[SinkName, ...] = get_args(SinkName)
"""Where metrics can go besides metrics.jsonl; each is an optional package."""

PLACES = ("shards", "source", "order", "tls_roots", "out")
"""Fields that tell where things are, and not what is trained."""


class BankSettings(Schema):
    """How every bank of a run is trained; what is trained is in the recipe's groups."""

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
    float32."""
    shards: int = Field(default=1, ge=1)
    """Processes that share the latents of every SAE, for SAEs wider than one device [processes]."""
    replicas: int = Field(default=1, ge=1)
    """Times that each of these is there again, to share the rows of a batch [processes]."""

    @model_validator(mode="after")
    def _check_ranks(self) -> "BankSettings":
        if self.batch_rows % self.replicas:
            raise ValueError(f"batch_rows={self.batch_rows} does not divide by replicas={self.replicas}; choose a multiple")
        if self.ranks > 1 and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"shards={self.shards}, replicas={self.replicas}: device={self.device} has one; choose cpu or cuda")
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> "BankSettings":
        if self.precision == "bfloat16" and not self.has_bfloat16_kernels:
            raise ValueError(
                f"precision=bfloat16 with device={self.device}, engine={self.engine}: bfloat16 has kernels for device=cuda with "
                "engine=auto or pairs; choose these, or precision=float32"
            )
        return self

    @property
    def has_bfloat16_kernels(self) -> bool:
        """Whether steps can be computed in bfloat16."""
        return self.device.partition(":")[0] == "cuda" and self.engine != "dense"

    @property
    def products(self) -> Literal["float32", "bfloat16"]:
        """The precision that steps have."""
        return "bfloat16" if self.precision != "float32" and self.has_bfloat16_kernels else "float32"

    @property
    def ranks(self) -> int:
        """Processes that train a bank together."""
        return self.shards * self.replicas


class TrainConfig(Schema):
    """A bank: its activations, its SAEs and its length."""

    site: Site
    """Where the activations are from."""
    shards: Path
    """The site's folder of shards, written by `everyscope harvest`."""
    source: str | None = None
    """Where activations come from instead: an address of shards, or flight://HOST:PORT/SITE of activation servers."""
    order: Literal["fixed", "any"] = "fixed"
    """Of servers' chunks: fixed is the order of the shards, any takes what the servers have at hand and keeps a journal."""
    tls_roots: Path | None = None
    """Certificates to trust servers by, PEM."""
    saes: tuple[SaeConfig, ...] = Field(min_length=1)
    """The SAEs to train, all on the same batches."""
    num_tokens: int = Field(ge=1)
    """Activation vectors that each SAE sees; the shards are read again where they hold fewer [rows]."""
    max_norm: float | None = Field(default=MAX_NORM, ge=TAIL)
    """Rows whose norm is above this many times the site's median norm are left out; None keeps all, as in the paper [1]."""
    settings: BankSettings = BankSettings()
    """Batch, checkpoints, logging, device."""
    out: Path
    """Folder for this site's trained SAEs, checkpoints and metrics."""

    @model_validator(mode="after")
    def _check_names(self) -> "TrainConfig":
        names = [sae_name(config) for config in self.saes]
        if len(set(names)) < len(names):
            raise ValueError(f"saes={names}: two SAEs of a bank share width, sparsity (or target_l0) and seed; change one")
        if self.order == "any" and not (self.source or "").startswith("flight"):
            raise ValueError(f"order='any' with source={self.source!r}: only servers have it; give flight://HOST:PORT/SITE")
        if self.order == "any" and self.settings.ranks > 1:
            raise ValueError(
                f"order='any' with {self.settings.ranks} processes: each would take other rows; choose order='fixed'"
            )
        narrowest = min(config.width for config in self.saes)
        if self.settings.shards > narrowest:
            raise ValueError(f"settings.shards={self.settings.shards}: an SAE of width {narrowest} has not so many latents")
        if self.num_tokens < self.settings.batch_rows:
            raise ValueError(f"num_tokens={self.num_tokens} is less than one batch of batch_rows={self.settings.batch_rows}")
        return self

    @property
    def steps(self) -> int:
        """Updates of each SAE [steps]."""
        return self.num_tokens // self.settings.batch_rows

    def record(self) -> dict[str, Any]:
        """All fields but folders, as JSON values, so that a run's folder may be moved."""
        return {name: value for name, value in self.as_json().items() if name not in PLACES}

    @property
    def bank_id(self) -> str:
        """An identity of what is trained and how, whatever folders and log intervals are."""
        what = [[config.as_json() for config in self.saes], self.num_tokens, self.settings.batch_rows, self.max_norm]
        return content_id([self.site.folder, what])

    def identity_of(self, sae: SaeConfig, source: str) -> str:
        """An identity of one of the SAEs, trained on activations of identity `source`: the same in whatever group it trains."""
        what = [sae.as_json(), self.num_tokens, self.settings.batch_rows, self.max_norm]
        return content_id([self.site.folder, what, source])


def sae_name(config: SaeConfig) -> str:
    """The folder name of a trained SAE within its site."""
    sparsity = f"sparsity_{config.sparsity_weight:g}" if config.target_l0 is None else f"l0_{config.target_l0:g}"
    return f"width_{config.width}_{sparsity}_seed_{config.seed}"
