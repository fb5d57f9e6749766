"""The SAEs that are to be evaluated, wherever they were made, and how we know that one already is."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import sha256
from everyscope.base.ids import content_id
from everyscope.evaluate.calibration import source_of
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.files import TENSOR_FILE, trained_folders, weights_digest
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site, SiteKind, parse_folder
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE, NPZ_FILE
from everyscope.suite.reader import load_sae
from everyscope.suite.scores import read_metrics

DECIDING_FIELDS = {
    "model",
    "text",
    "num_sequences",
    "stride",
    "batch_blocks",
    "sae_dtype",
    "uniformity_sequences",
    "gradient_blocks",
    "baseline_sequences",
    "resamples",
    "interval_level",
    "seed",
}
"""Fields of the config on which scores depend; what calibration depends on comes with its source."""
SCORE_VERSION = 2
"""Part of every score's identity; raised when the same inputs would give other numbers."""
RELEASE_KINDS: dict[str, SiteKind] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "embedding": "embed"}
"""The last word of a Gemma Scope repository's name, or a folder's name in it, and the site it stands for."""


@dataclass(frozen=True)
class Target:
    """One SAE and the place of its scores."""

    site: Site
    name: str
    """The SAE's folder below that of its site, as in width_512_l0_25 or width_16k/average_l0_71."""
    folder: Path
    """Where the SAE lies."""
    weights: Path
    """The file that holds its tensors."""
    scores: Path
    """Where its scores go."""
    digest: str
    """SHA-256 of that file, by which scores know the weights they are of."""
    identity: str
    """Hash of all that decides the scores: SAE, model, text, sizes, calibration."""

    @property
    def place(self) -> str:
        """Its folder below the scores, as in resid_post/layer_2/width_512_l0_25: how comparisons name it."""
        return f"{self.site.folder}/{self.name}"

    @property
    def is_scored(self) -> bool:
        """True where the scores of exactly this evaluation are there; metrics.json is written last."""
        path = self.scores / METRICS_FILE
        return path.exists() and (self.scores / LATENTS_FILE).exists() and read_metrics(path).get("evaluation") == self.identity

    def sae(self) -> Sae:
        """Its tensors, float32 on the CPU; raises as `load_sae` does."""
        return load_sae(self.folder)


@dataclass(frozen=True)
class _Found:
    site: Site
    name: str
    folder: Path
    weights: Path
    digest: str


def load_targets(config: EvaluateConfig) -> list[Target]:
    """The SAEs below `config.trained` that the config asks for, by site and name.

    DataError where there is none, or where one that is asked for is missing; ConfigError where a path does not tell the site.
    """
    found = [*_of_training(config)] or [*_of_release(config)]
    if not found:
        raise DataError(
            f"{config.trained}: holds no finished SAE and no {NPZ_FILE}; run `everyscope train` first, or give the folder of a "
            "suite"
        )
    places = {f"{sae.site.folder}/{sae.name}" for sae in found}
    if config.saes is not None and (missing := sorted(set(config.saes) - places)):
        raise DataError(f"{config.trained}: has no SAE {missing[0]}; it has {', '.join(sorted(places)[:3])}, ...; mend saes")
    chosen = [
        sae
        for sae in found
        if (config.sites is None or sae.site in config.sites)
        and (config.saes is None or f"{sae.site.folder}/{sae.name}" in config.saes)
    ]
    if not chosen:
        have = ", ".join(str(site) for site in sorted({sae.site for sae in found}))
        raise DataError(f"{config.trained}: has no SAE of the sites asked for; it has SAEs of {have}; mend sites")
    sources = {site: source_of(config, site) for site in sorted({sae.site for sae in chosen})}
    return sorted((_target(config, sae, sources[sae.site]) for sae in chosen), key=lambda target: (target.site, target.name))


def _of_training(config: EvaluateConfig) -> Iterator[_Found]:
    for folder in trained_folders(config.trained):
        site = parse_folder(folder.parent.relative_to(config.trained).as_posix())
        yield _Found(site, folder.name, folder, folder / TENSOR_FILE, weights_digest(folder))


def _of_release(config: EvaluateConfig) -> Iterator[_Found]:
    """The layouts of our suites, <site>/layer_<L>/..., and of Gemma Scope, <release>/layer_<L>/... and <release>/embedding/...

    A suite is read by its folders, not by its index, so that suites of any version can be measured.
    """
    for weights in sorted(config.trained.rglob(NPZ_FILE)):
        parts = weights.absolute().parent.parts
        kind = _kind(parts) or config.site_kind
        if kind is None:
            raise ConfigError(
                f"{weights}: its path does not tell the kind of site; set site_kind={' or '.join(get_args(SiteKind))}"
            )
        at = next((at for at in reversed(range(len(parts))) if re.fullmatch(r"layer_\d+|embedding", parts[at])), None)
        if at is None:
            raise ConfigError(f"{weights}: its path tells no layer; expected a folder like layer_12 above it")
        layer = 0 if kind == "embed" else int(parts[at].removeprefix("layer_"))
        yield _Found(Site(kind, layer), "/".join(parts[at + 1 :]) or "sae", weights.parent, weights, sha256(weights))


def _kind(parts: tuple[str, ...]) -> SiteKind | None:
    """The kind of site that folders' names tell, the innermost first; ConfigError for transcoders, which join two sites."""
    for part in reversed(parts):
        word = part.rpartition("-")[2]
        if word.startswith("transcoders"):
            raise ConfigError(f"{part}: transcoders read one site and write another; give SAEs of one site")
        if part in get_args(SiteKind):
            return next(kind for kind in get_args(SiteKind) if kind == part)
        if word in RELEASE_KINDS and (word != part or word == "embedding"):
            return RELEASE_KINDS[word]
    return None


def _target(config: EvaluateConfig, sae: _Found, source: str) -> Target:
    decides: dict[str, Any] = config.model_dump(mode="json", include=DECIDING_FIELDS)
    decides |= {
        "version": SCORE_VERSION,
        "site": sae.site.folder,
        "name": sae.name,
        "calibration": source,
        "sae": sae.digest,
    }
    scores = config.out / sae.site.folder / sae.name
    return Target(sae.site, sae.name, sae.folder, sae.weights, scores, sae.digest, content_id(decides))
