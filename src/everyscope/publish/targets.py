"""The SAEs to publish, with their scores and their places in the suite."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median_low
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import sha256
from everyscope.base.progress import say
from everyscope.publish.config import PublishConfig
from everyscope.sae.files import RECORD_FILE, WEIGHTS, read_record, trained_folders, weights_digest
from everyscope.sites.names import Site, parse_folder
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE, sae_folder
from everyscope.suite.records import Headline
from everyscope.suite.scores import headline_of, read_metrics

CANONICAL_L0 = 100.0
"""The L0 that stands for a site and width whose SAEs aimed at none, as in Gemma Scope [latents]."""
NEEDED = [
    "site",
    "layer",
    "d_in",
    "width",
    "l0",
    "fvu",
    "fvu_usual",
    "fvu_uncentred",
    "fvu_pca",
    "fvu_pca_usual",
    "delta_loss",
    "delta_loss_mean",
    "delta_loss_zero",
    "kl",
    "mse",
    "cosine",
    "l2_ratio",
    "reconstruction_bias",
    "loss_recovered",
    "loss_recovered_reason",
    "loss_recovered_zero",
    "loss_recovered_zero_reason",
    "loss_clean",
    "loss_spliced",
    "loss_zero_ablated",
    "loss_mean_ablated",
    "dead_fraction",
    "dense_fraction",
    "intervals",
    "interval_level",
    "baselines",
    "by_position",
    "by_segment",
    "firing",
    "uniformity",
    "massive",
    "precision",
    "num_tokens",
    "num_usual_tokens",
    "num_loss_tokens",
    "num_documents",
    "num_sequences",
    "context",
    "data",
    "mask",
    "evaluation",
    WEIGHTS,
]
"""Keys that metrics.json must have; null counts as having it."""


@dataclass(frozen=True)
class PublishTarget:
    """One SAE to publish, and where it goes."""

    site: Site
    name: str
    """Its path below the trained SAEs and the scores, by which slices call it."""
    trained: Path
    scores: Path
    metrics: dict[str, Any]
    target_l0: float | None
    """The L0 that its training aimed at, if any [latents]."""
    folder: str = ""
    """Its path below the suite."""
    is_canonical: bool = False
    has_skip: bool = False
    """Whether it is a transcoder with an affine skip."""

    @property
    def checksums(self) -> list[str]:
        """Hashes of all files that this SAE is published from."""
        inputs = (self.trained / RECORD_FILE, self.scores / METRICS_FILE, self.scores / LATENTS_FILE)
        return [weights_digest(self.trained), *(sha256(path) for path in inputs)]

    @property
    def headline(self) -> Headline:
        """What suite.json says about it."""
        return headline_of(self.metrics, is_canonical=self.is_canonical)


def find_targets(config: PublishConfig) -> list[PublishTarget]:
    """All trained SAEs with their scores and future folders, by site, layer, width and L0.

    DataError where nothing is trained, or an SAE has no scores yet, or scores of an older form.
    """
    found = [_read_source(config, folder) for folder in trained_folders(config.trained)]
    if not found:
        raise DataError(f"{config.trained}: holds no finished SAE; run `everyscope train` first")
    found.sort(key=lambda source: (source.site, source.metrics["width"], source.metrics["l0"], source.name))
    placed = _placed(found)
    names = {source.name for source in _canonical(placed, config.canonical_l0)}
    return [replace(source, is_canonical=source.name in names) for source in placed]


def _read_source(config: PublishConfig, folder: Path) -> PublishTarget:
    place = folder.relative_to(config.trained)
    scores = config.scores / place
    if not (scores / METRICS_FILE).exists():
        raise DataError(f"{scores}: no scores for {folder}; run `everyscope evaluate` first")
    metrics = read_metrics(scores / METRICS_FILE)
    if missing := [name for name in NEEDED if name not in metrics]:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DataError(
            f"{scores / METRICS_FILE}: lacks {few}; these scores are of an older version, run `everyscope evaluate` again"
        )
    record = read_record(folder)
    if metrics[WEIGHTS] != record[WEIGHTS]:
        raise DataError(f"{scores}: its scores are of other weights than those in {folder}; run `everyscope evaluate` again")
    target = record.get("config", {}).get("target_l0")
    site, has_skip = parse_folder(place.parent.as_posix()), bool(record.get("has_skip"))
    return PublishTarget(site, place.as_posix(), folder, scores, metrics, target, has_skip=has_skip)


def _placed(sources: Iterable[PublishTarget]) -> list[PublishTarget]:
    """Each with a folder of its own, though two L0s may round to one name."""
    taken: Counter[str] = Counter()
    placed = []
    for source in sources:
        folder = sae_folder(source.site, source.metrics["width"], source.metrics["l0"], has_skip=source.has_skip)
        taken[folder] += 1
        if taken[folder] > 1:
            say(f"Two SAEs round to {folder}; {source.trained.name} becomes {folder}_{taken[folder]}")
            folder = f"{folder}_{taken[folder]}"
        placed.append(replace(source, folder=folder))
    return placed


def _canonical(sources: Iterable[PublishTarget], wanted: float | None) -> list[PublishTarget]:
    """For each site and width, the SAE of L0 nearest to `wanted` (None: as the config says); of equals the first by name."""
    chosen = []
    for _, group in groupby(sources, key=lambda source: (source.site, source.metrics["width"])):
        here = list(group)
        targets = [source.target_l0 for source in here if source.target_l0 is not None]
        l0 = wanted or (median_low(targets) if targets else CANONICAL_L0)
        chosen.append(min(here, key=lambda source: (abs(source.metrics["l0"] - l0), source.name)))
    return chosen
