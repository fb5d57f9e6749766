"""The SAEs of an evaluation with their scores, as every comparison starts from them."""

from dataclasses import dataclass
from typing import Any

from everyscope.base.errors import DataError
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.targets import EvaluateTarget, load_targets
from everyscope.sae.files import has_sae, read_record
from everyscope.sites.names import Site
from everyscope.suite.layout import METRICS_FILE
from everyscope.suite.scores import read_metrics


@dataclass(frozen=True)
class Scored:
    """One SAE and what its evaluation found."""

    target: EvaluateTarget
    metrics: dict[str, Any]
    """metrics.json."""

    @property
    def site(self) -> Site:
        """Where it sits."""
        return self.target.site

    @property
    def name(self) -> str:
        """Its folder below the scores, as in resid_post/layer_2/width_512_l0_25_seed_0."""
        return self.target.place

    @property
    def width(self) -> int:
        """Number of latents [latents]."""
        return self.metrics["width"]

    @property
    def l0(self) -> float:
        """Mean number of active latents [latents]."""
        return self.metrics["l0"]

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, of all tokens [1]."""
        return self.metrics["fvu"]

    @property
    def fvu_usual(self) -> float:
        """The same of usual tokens: massive ones are left out [1]."""
        return self.metrics["fvu_usual"]

    @property
    def delta_loss(self) -> float:
        """Rise of the model's loss [nats/token]."""
        return self.metrics["delta_loss"]

    @property
    def target_l0(self) -> float | None:
        """The L0 that its training aimed at; None where it had no aim or no record tells [latents]."""
        return read_record(self.target.folder)["config"].get("target_l0") if has_sae(self.target.folder) else None

    @property
    def evidence(self) -> tuple[str, str]:
        """Name and identity of its scores: a comparison of equal evidence need not be made again."""
        return self.name, self.metrics["evaluation"]


def read_scored(config: EvaluateConfig) -> list[Scored]:
    """Every SAE of the evaluation, by site and name; DataError where one has not been evaluated under just this config."""
    scored = []
    for target in load_targets(config):
        if not target.is_scored:
            raise DataError(f"{target.scores}: no scores of this SAE under these settings; run `everyscope evaluate` first")
        scored.append(Scored(target, read_metrics(target.scores / METRICS_FILE)))
    return scored
