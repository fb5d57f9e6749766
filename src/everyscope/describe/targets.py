"""The SAEs that are to be described, whom each is compared with, and which descriptions exist already.

Two identities, for they cost differently: what is measured on text depends on this SAE, the model and the text alone; what
surrounds it (its neighbours' decoders, its evaluation) changes whenever another SAE is trained, and is rewritten in seconds.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from everyscope.base.errors import DataError
from everyscope.base.files import sha256
from everyscope.base.ids import content_id
from everyscope.base.tables import check_table
from everyscope.describe.config import DescribeConfig
from everyscope.sae.files import trained_folders, weights_digest
from everyscope.sites.names import Site, parse_folder
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.suite.scores import read_metrics

TEXT_FIELDS = {"model", "text", "num_sequences", "train_stride"}
"""Fields of the config that decide which text is read."""
MEASURED_FIELDS = TEXT_FIELDS | {
    "batch_blocks",
    "top_examples",
    "group_examples",
    "examples_per_document",
    "window_before",
    "window_after",
    "raw_logits",
    "seed",
}
"""Fields of the config on which what is measured depends."""
VERSION = 2
"""Part of every identity; raised when the same inputs would give another description."""
METADATA_KEY = "everyscope"
"""Under which latents.parquet and sequences.parquet say, as JSON, what they are."""
SAME, WIDER, NARROWER, PREVIOUS_LAYER, NEXT_LAYER = range(5)
"""How a neighbour's SAE relates to ours: the same one, of the next larger or smaller width, or a layer before or behind."""


@dataclass(frozen=True)
class DescribeTarget:
    """One trained SAE and the place of its description."""

    site: Site
    name: str
    """The SAE's folder name, unique at its site."""
    folder: Path
    """Where the trained SAE lies."""
    scores: Path
    """Its latents on held-out text, as evaluated."""
    out: Path
    """Its description: latents.parquet."""
    number: int
    """Its index in saes.json."""
    width: int
    l0: float
    sae: str
    """Hash of its tensors."""
    norm_limit: float
    """Tokens whose activation has a larger norm are massive: they count for this SAE as little as BOS does. Infinite for none."""
    input_limit: float
    """Of a transcoder, the same of what it reads, beside `norm_limit` of what it writes; infinite for SAEs."""
    relatives: tuple[tuple[int, int], ...]
    """Whom it is compared with: (relation, number)."""
    identity: str
    """Hash of all that decides what is measured on text."""
    surroundings: str
    """Hash of all that decides its other columns."""

    @property
    def is_measured(self) -> bool:
        """True where exactly these measurements exist."""
        return read_facts(self.out).get("identity") == self.identity

    @property
    def is_whole(self) -> bool:
        """True where its surroundings are described too, as they are now."""
        facts = read_facts(self.out)
        return (facts.get("identity"), facts.get("surroundings")) == (self.identity, self.surroundings)


def read_facts(path: Path) -> dict[str, Any]:
    """What a Parquet file of ours says of itself; nothing where it is missing, damaged or someone else's."""
    try:
        check_table(path, "it is described again")
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        facts = json.loads(metadata.get(METADATA_KEY.encode(), b"{}"))
    except (DataError, OSError, ValueError, pyarrow.ArrowException):
        return {}
    return facts if isinstance(facts, dict) else {}


def described_text_identity(config: DescribeConfig) -> str:
    """Hash of all that decides which text is read."""
    return content_id({"version": VERSION, **config.model_dump(mode="json", include=TEXT_FIELDS)})


def find_targets(config: DescribeConfig) -> tuple[DescribeTarget, ...]:
    """All finished SAEs below `config.trained`, by site, width, L0 and name; DataError where there is none, or no scores."""
    folders = trained_folders(config.trained)
    if not folders:
        raise DataError(f"{config.trained}: holds no finished SAE; run `everyscope train` first")
    found = sorted((_found(config, folder) for folder in folders), key=lambda its: (its.site, its.width, its.l0, its.name))
    decides = config.model_dump(mode="json", include=MEASURED_FIELDS)
    targets = []
    for number, its in enumerate(found):
        relatives = _relatives(number, found)
        limits = {"norm_limit": its.norm_limit}
        if its.site.inputs != its.site.outputs:
            limits["input_norm_limit"] = its.input_limit
        known = {name: None if math.isinf(limit) else limit for name, limit in limits.items()}
        identity = content_id({"version": VERSION, "site": its.site.folder, "sae": its.sae, **known, **decides})
        seen = [[relation, other, found[other].sae] for relation, other in relatives]
        surroundings = content_id({"saes": seen, "count": config.neighbours, "scores": sha256(its.scores)})
        out = config.out / its.site.folder / its.name / LATENTS_FILE
        targets.append(
            DescribeTarget(
                its.site,
                its.name,
                its.folder,
                its.scores,
                out,
                number,
                its.width,
                its.l0,
                its.sae,
                its.norm_limit,
                its.input_limit,
                relatives,
                identity,
                surroundings,
            )
        )
    return tuple(targets)


@dataclass(frozen=True)
class _Found:
    site: Site
    name: str
    folder: Path
    scores: Path
    width: int
    l0: float
    sae: str
    norm_limit: float
    input_limit: float


def _found(config: DescribeConfig, folder: Path) -> _Found:
    place = folder.relative_to(config.trained)
    scores = config.scores / place
    if not (scores / METRICS_FILE).exists() or not (scores / LATENTS_FILE).exists():
        raise DataError(f"{scores}: no scores for {folder}; run `everyscope evaluate` first")
    metrics = read_metrics(scores / METRICS_FILE)
    try:
        width, l0 = int(metrics["width"]), float(metrics["l0"])
        limits = [(metrics.get("massive") or {}).get(name) for name in ("norm_limit", "input_norm_limit")]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{scores / METRICS_FILE}: has no width or no l0; run `everyscope evaluate` again") from error
    site = parse_folder(place.parent.as_posix())
    norm_limit, input_limit = (math.inf if limit is None else float(limit) for limit in limits)
    return _Found(site, folder.name, folder, scores / LATENTS_FILE, width, l0, weights_digest(folder), norm_limit, input_limit)


def _relatives(number: int, saes: Sequence[_Found]) -> tuple[tuple[int, int], ...]:
    """Whom an SAE is compared with: itself, and the one of nearest L0 in each other relation, where there is one."""
    own = saes[number]
    here = {its.width for its in saes if its.site == own.site}
    wider = min((width for width in here if width > own.width), default=None)
    narrower = max((width for width in here if width < own.width), default=None)
    wanted: dict[int, Callable[[_Found], bool]] = {
        WIDER: lambda its: its.site == own.site and its.width == wider,
        NARROWER: lambda its: its.site == own.site and its.width == narrower,
    }
    if own.site.kind not in ("attn_out", "embed"):  # heads of different layers share no coordinates
        for relation, step in ((PREVIOUS_LAYER, -1), (NEXT_LAYER, 1)):
            wanted[relation] = lambda its, layer=own.site.layer + step: (
                its.site.kind == own.site.kind and its.site.layer == layer and its.width == own.width
            )
    relatives = [(SAME, number)]
    for relation, is_wanted in wanted.items():
        candidates = [other for other, its in enumerate(saes) if is_wanted(its)]
        if candidates:
            relatives.append((relation, min(candidates, key=lambda other: (abs(saes[other].l0 - own.l0), other))))
    return tuple(relatives)
