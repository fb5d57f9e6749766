"""The SAEs that are to be explained, and how we know that one already is."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.describe.explanations.config import EndpointConfig, ExplainConfig
from everyscope.describe.explanations.table import EXPLANATIONS_FILE, explanation_facts
from everyscope.sae.files import WEIGHTS, read_record, trained_folders
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.names import Site, parse_folder

IDLE_FIELDS = {"saes", "out", "trained", "batch_blocks", "saes_per_pass", "endpoint", "share"}
"""Fields of the config on which explanations do not depend, or only some do."""
DECIDING_ENDPOINT_FIELDS = {
    "model",
    "num_latents",
    "num_examples",
    "judged_windows",
    "windows_per_request",
    "max_completion_tokens",
    "temperature",
}
"""Fields of the endpoint on which its labels depend; where it stands, and what it may cost, are not among them."""
VERSION = 5
"""Part of every identity; raised when the same inputs would give other explanations."""


@dataclass(frozen=True)
class ExplainTarget:
    """One trained SAE and the place of its explanations."""

    site: Site
    name: str
    """The SAE's folder name, unique at its site."""
    folder: Path
    """Where the trained SAE lies."""
    out: Path
    """Where its explanations go."""
    width: int
    limits: NormLimits
    """The norms above which rows are massive."""
    identity: str
    """Hash of all that decides the explanations."""
    endpoint: EndpointConfig | None
    """The language model that labels a sample of its latents, if one does."""

    @property
    def file(self) -> Path:
        """Its explanations."""
        return self.out / EXPLANATIONS_FILE

    @property
    def is_explained(self) -> bool:
        """True where exactly these explanations exist."""
        return explanation_facts(self.file).get("identity") == self.identity


def find_targets(config: ExplainConfig) -> list[ExplainTarget]:
    """The config's share of all finished SAEs below `config.trained`, by site and name; DataError where there is none, or none
    that is asked for.
    """
    folders = trained_folders(config.trained)
    if not folders:
        raise DataError(f"{config.trained}: holds no finished SAE; run `everyscope train` first")
    wanted = [folder for folder in folders if fnmatchcase(folder.relative_to(config.trained).as_posix(), config.saes)]
    if not wanted:
        one = folders[0].relative_to(config.trained).as_posix()
        raise DataError(f"saes={config.saes!r} matches no SAE below {config.trained}; one of them is {one}")
    targets = [_target(config, folder) for folder in wanted]
    if config.endpoint is not None and not any(target.endpoint for target in targets):
        raise DataError(
            f"endpoint.saes={config.endpoint.saes!r} matches no SAE below {config.trained}; "
            f"one of them is {folders[0].relative_to(config.trained).as_posix()}"
        )
    number, count = config.share
    return sorted(targets, key=lambda target: (target.site, target.name))[number::count]


def _target(config: ExplainConfig, folder: Path) -> ExplainTarget:
    name = folder.relative_to(config.trained).as_posix()
    site = parse_folder(folder.parent.relative_to(config.trained).as_posix())
    endpoint = config.endpoint if config.endpoint is not None and fnmatchcase(name, config.endpoint.saes) else None
    record = read_record(folder)
    limit = record.get("norm_limit")
    written = record.get("target_norm_limit") if site.inputs != site.outputs else limit
    limits = NormLimits(*(math.inf if one is None else float(one) for one in (limit, written)))
    decides: dict[str, Any] = config.model_dump(mode="json", exclude=IDLE_FIELDS)
    decides |= {
        "version": VERSION,
        "sae": record[WEIGHTS],
        "norm_limit": limit,
        **({"target_norm_limit": written} if site.inputs != site.outputs else {}),
        "endpoint": endpoint and endpoint.model_dump(mode="json", include=DECIDING_ENDPOINT_FIELDS),
    }
    return ExplainTarget(
        site, folder.name, folder, config.out / name, int(record["width"]), limits, content_id(decides), endpoint
    )
