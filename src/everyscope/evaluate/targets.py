"""The SAEs that are to be evaluated, and how we know that one already is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, sha256
from everyscope.base.ids import content_id
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.files import TENSOR_FILE, trained_folders
from everyscope.shards.reader import Shards
from everyscope.sites.names import Site, parse_folder
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE

DECIDING_FIELDS = {"model", "text", "num_sequences", "batch_blocks", "pca_rows"}
"""Fields of the config on which scores depend."""
SCORE_VERSION = 1
"""Part of every score's identity; raised when the same inputs would give other numbers."""


@dataclass(frozen=True)
class Target:
    """One trained SAE and the place of its scores."""

    site: Site
    name: str
    """The SAE's folder name, unique at its site."""
    folder: Path
    """Where the trained SAE lies."""
    scores: Path
    """Where its scores go."""
    identity: str
    """Hash of all that decides the scores: SAE, model, text, sizes, shards."""

    @property
    def is_scored(self) -> bool:
        """True where the scores of exactly this evaluation are there; metrics.json is written last."""
        path = self.scores / METRICS_FILE
        return path.exists() and (self.scores / LATENTS_FILE).exists() and read_json(path).get("evaluation") == self.identity


def find_targets(config: EvaluateConfig) -> list[Target]:
    """All finished SAEs below `config.trained`, by site and name; DataError where there is none."""
    folders = trained_folders(config.trained)
    if not folders:
        raise DataError(f"{config.trained}: holds no finished SAE; run `everyscope train` first")
    sites = {folder: parse_folder(folder.parent.relative_to(config.trained).as_posix()) for folder in folders}
    shards = {site: Shards(config.shards / site.folder).identity for site in sorted(set(sites.values()))}
    return sorted((_target(config, folder, site, shards[site]) for folder, site in sites.items()), key=lambda t: (t.site, t.name))


def _target(config: EvaluateConfig, folder: Path, site: Site, shards: str) -> Target:
    decides: dict[str, Any] = config.model_dump(mode="json", include=DECIDING_FIELDS)
    decides |= {
        "version": SCORE_VERSION,
        "site": site.folder,
        "name": folder.name,
        "shards": shards,
        "sae": sha256(folder / TENSOR_FILE),
    }
    return Target(site, folder.name, folder, config.out / site.folder / folder.name, content_id(decides))
