"""Assemble a suite from trained SAEs and their scores.

Files are written whole, one by one, and suite.json last: a suite with an index is complete. Publishing what is already
published does nothing; publishing something else into the same folder replaces it, SAE by SAE.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import (
    PARTIAL,
    make_folder,
    read_json,
    require_free_space,
    sha256,
    storage_errors,
    whole_file,
    write_json,
)
from everyscope.base.ids import content_id
from everyscope.base.progress import meter, say
from everyscope.publish.config import PublishConfig
from everyscope.publish.formats import write_npz, write_saelens
from everyscope.publish.pages import TEMPLATES, report_files, write_card, write_report
from everyscope.sae.files import RECORD_FILE, TENSOR_FILE, read_sae, trained_folders
from everyscope.sites.names import Site, parse_folder
from everyscope.suite.layout import (
    CARD_FILE,
    INDEX_FILE,
    LATENTS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAE_FILES,
    sae_folder,
    sae_folders,
)
from everyscope.suite.records import Headline, Measured, SaeRecord, SuiteIndex, read_index


@dataclass(frozen=True)
class PublishResult:
    """What was published."""

    suite: Path
    """The suite's folder."""
    report: Path
    """Its report, to be opened in a browser."""


@dataclass(frozen=True)
class _Source:
    """One SAE to publish, and where it goes."""

    site: Site
    trained: Path
    scores: Path
    metrics: dict[str, Any]
    folder: str = ""

    @property
    def checksums(self) -> list[str]:
        """Hashes of all files that this SAE is published from."""
        inputs = (self.trained / TENSOR_FILE, self.trained / RECORD_FILE, self.scores / METRICS_FILE, self.scores / LATENTS_FILE)
        return [sha256(path) for path in inputs]


def run(config: PublishConfig) -> PublishResult:
    """Write the suite of all trained SAEs below `config.trained`.

    Raises DataError where nothing is trained, or an SAE has no scores yet; StorageError where the disk is too small.
    """
    result = PublishResult(config.out, config.out / REPORT_FILE)
    sources = _find_sources(config)
    inputs = content_id(
        {
            "version": version("everyscope"),
            "names": [config.title, config.model, config.license],
            "templates": {path.name: sha256(path) for path in sorted(TEMPLATES.iterdir())},
            "saes": {source.folder: source.checksums for source in sources},
        }
    )
    if _is_published(config.out, inputs):
        return result
    make_folder(config.out)
    needed = sum(2 * (source.trained / TENSOR_FILE).stat().st_size for source in sources)
    require_free_space(config.out, needed, "publishing the suite")
    (config.out / INDEX_FILE).unlink(missing_ok=True)
    _remove_stale(config.out, {source.folder for source in sources})
    with meter("publish", len(sources), "SAEs") as progress:
        records = []
        for source in sources:
            records.append(_publish_sae(config, source))
            progress.advance()
    metrics = sources[0].metrics
    measured = Measured(**{name: metrics[name] for name in Measured.model_fields})
    index = SuiteIndex(
        version=version("everyscope"),
        title=config.title,
        model=config.model,
        measured=measured,
        inputs=inputs,
        saes=tuple(records),
        files={},
    )
    write_report(config.out, index)
    write_card(config.out, index, config.license)
    files = {name: sha256(config.out / name) for name in sorted([CARD_FILE, *report_files()])}
    write_json(config.out / INDEX_FILE, index.model_copy(update={"files": files}).as_json())
    return result


def _find_sources(config: PublishConfig) -> list[_Source]:
    """All trained SAEs with their scores and future folders, by site, layer, width and L0."""
    found = []
    for folder in trained_folders(config.trained):
        place = folder.relative_to(config.trained)
        scores = config.scores / place
        if not (scores / METRICS_FILE).exists():
            raise DataError(f"{scores}: no scores for {folder}; run `everyscope evaluate` first")
        found.append(_Source(parse_folder(place.parent.as_posix()), folder, scores, read_json(scores / METRICS_FILE)))
    if not found:
        raise DataError(f"{config.trained}: holds no finished SAE; run `everyscope train` first")
    found.sort(key=lambda source: (source.site, source.metrics["width"], source.metrics["l0"], source.trained.name))
    taken: Counter[str] = Counter()
    sources = []
    for source in found:
        folder = sae_folder(source.site, source.metrics["width"], source.metrics["l0"])
        taken[folder] += 1
        if taken[folder] > 1:
            say(f"Two SAEs round to {folder}; {source.trained.name} becomes {folder}_{taken[folder]}")
            folder = f"{folder}_{taken[folder]}"
        sources.append(_Source(source.site, source.trained, source.scores, source.metrics, folder))
    return sources


def _is_published(suite: Path, inputs: str) -> bool:
    """True where `suite` was made from the very same inputs and none of its files has been taken away."""
    if not (suite / INDEX_FILE).exists():
        return False
    try:
        index = read_index(suite)
    except DataError:
        return False
    names = [*index.files, *(f"{sae.folder}/{name}" for sae in index.saes for name in sae.files)]
    return index.inputs == inputs and all((suite / name).is_file() for name in names)


def _remove_stale(suite: Path, folders: set[str]) -> None:
    """Delete our own files from SAE folders that are not published any more; whatever else lies there stays."""
    for folder in sae_folders(suite):
        if folder.relative_to(suite).as_posix() not in folders:
            for name in SAE_FILES:
                (folder / name).unlink(missing_ok=True)
                (folder / (name + PARTIAL)).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _publish_sae(config: PublishConfig, source: _Source) -> SaeRecord:
    """Write the folder of one SAE."""
    folder, metrics = config.out / source.folder, source.metrics
    sae, record = read_sae(source.trained)
    write_npz(folder, sae)
    write_saelens(folder, sae, source.site, config.model, record, metrics)
    for name in (METRICS_FILE, LATENTS_FILE):
        with whole_file(folder / name) as partial, storage_errors(folder / name):
            shutil.copyfile(source.scores / name, partial)
    return SaeRecord(
        folder=source.folder,
        name=source.trained.name,
        site=source.site.kind,
        layer=source.site.layer,
        d_in=sae.d_in,
        width=sae.d_sae,
        num_tokens=record.get("num_tokens"),
        metrics=Headline(**{name: metrics[name] for name in Headline.model_fields}),
        files={name: sha256(folder / name) for name in SAE_FILES},
    )
