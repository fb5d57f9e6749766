"""The SAEs that are to be evaluated, wherever they were made, and how we know that one already is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.evaluate.calibration import calibration_identity
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.layouts import FoundSae, saes_of_release, saes_of_training
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site
from everyscope.suite.formats.known import EXPECTED, refuse_several_layers
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.suite.reader import load_sae
from everyscope.suite.scores import read_metrics

DECIDING_FIELDS = {
    "model",
    "text",
    "num_sequences",
    "stride",
    "batch_blocks",
    "sae_dtype",
    "max_norm",
    "uniformity_sequences",
    "gradient_blocks",
    "baseline_sequences",
    "resamples",
    "interval_level",
    "seed",
}
"""Fields of the config on which scores depend; what calibration depends on comes with its source."""
SCORE_VERSION = 3
"""Part of every score's identity; raised when the same inputs would give other numbers."""


@dataclass(frozen=True)
class EvaluateTarget:
    """One SAE and the place of its scores."""

    site: Site
    name: str
    """The SAE's folder below that of its site, as in width_512_l0_25 or width_16k/average_l0_71."""
    folder: Path
    """Where the SAE lies; of a set, its file."""
    weights: Path
    """The file that holds its tensors."""
    scores: Path
    """Where its scores go."""
    digest: str
    """SHA-256 of that file, by which scores know the weights they are of."""
    identity: str
    """Hash of everything that determines the scores: SAE, model, text, sizes, calibration."""
    is_of_unscaled_embeddings: bool = False
    """Whether it was trained on rows of the embedding matrix, which some models multiply before the first block."""

    @property
    def place(self) -> str:
        """Its folder below the scores, as in resid_post/layer_2/width_512_l0_25: how comparisons name it."""
        return f"{self.site.folder}/{self.name}"

    @property
    def is_scored(self) -> bool:
        """True where the scores of exactly this evaluation exist; metrics.json is written last."""
        path = self.scores / METRICS_FILE
        return path.exists() and (self.scores / LATENTS_FILE).exists() and read_metrics(path).get("evaluation") == self.identity

    def sae(self) -> Sae:
        """Its tensors, float32 on the CPU; raises as `load_sae` does."""
        return load_sae(self.folder)


def load_targets(config: EvaluateConfig) -> list[EvaluateTarget]:
    """The SAEs below `config.trained` that the config asks for, by site and name.

    DataError where there is none, or where one that is asked for is missing; ConfigError where a path does not tell the site, or
    where all there is are coders of several layers at once.
    """
    found = [*saes_of_training(config.trained)] or [*saes_of_release(config.trained, config.site_kind)]
    if not found:
        for folder in (config.trained, *(path for path in sorted(config.trained.rglob("*")) if path.is_dir())):
            refuse_several_layers(folder)
        raise DataError(
            f"{config.trained}: holds no finished SAE; run `everyscope train` first, or give the folder of a suite, a release or "
            f"an SAE: {EXPECTED}"
        )
    places = {f"{sae.site.folder}/{sae.name}" for sae in found}
    if config.saes is not None and (missing := sorted(set(config.saes) - places)):
        raise DataError(f"{config.trained}: has no SAE {missing[0]}; it has {', '.join(sorted(places)[:3])}, ...; change saes")
    chosen = [
        sae
        for sae in found
        if (config.sites is None or sae.site in config.sites)
        and (config.saes is None or f"{sae.site.folder}/{sae.name}" in config.saes)
    ]
    if not chosen:
        have = ", ".join(str(site) for site in sorted({sae.site for sae in found}))
        raise DataError(f"{config.trained}: has no SAE of the sites asked for; it has SAEs of {have}; change sites")
    sources = {site: calibration_identity(config, site) for site in sorted({sae.site for sae in chosen})}
    return sorted((_target(config, sae, sources[sae.site]) for sae in chosen), key=lambda target: (target.site, target.name))


def _target(config: EvaluateConfig, sae: FoundSae, source: str) -> EvaluateTarget:
    decides: dict[str, Any] = config.model_dump(mode="json", include=DECIDING_FIELDS)
    decides |= {
        "version": SCORE_VERSION,
        "site": sae.site.folder,
        "name": sae.name,
        "calibration": source,
        "sae": sae.digest,
    }
    scores = config.out / sae.site.folder / sae.name
    return EvaluateTarget(
        sae.site, sae.name, sae.folder, sae.weights, scores, sae.digest, content_id(decides), sae.is_of_unscaled_embeddings
    )
