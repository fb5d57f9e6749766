"""Assemble a suite from trained SAEs and their scores.

Files are written whole, one by one, and suite.json last: a suite with an index is complete. Publishing what is already
published does nothing; publishing something else into the same folder replaces it, SAE by SAE.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from everyscope.base.errors import DataError
from everyscope.base.files import PARTIAL, make_folder, require_free_space, sha256, storage_errors, whole_file
from everyscope.base.ids import content_id
from everyscope.base.progress import meter, say
from everyscope.publish.config import PublishConfig
from everyscope.publish.descriptions import check_descriptions, described_files, description_checksums, publish_text
from everyscope.publish.evidence import Evidence
from everyscope.publish.flat import write_flat_table
from everyscope.publish.formats import write_saelens
from everyscope.publish.pages import TEMPLATES, write_card, write_report
from everyscope.publish.saebench import write_saebench
from everyscope.publish.slices import publish_cost, publish_slices, published_slices, read_cost, slice_checksums
from everyscope.publish.targets import PublishTarget, find_targets
from everyscope.sae.files import TENSOR_FILE, read_sae
from everyscope.suite.formats import gemma_scope
from everyscope.suite.layout import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    METRICS_FILE,
    NPZ_FILE,
    REPORT_FILE,
    SAE_FILES,
    SAEBENCH_FOLDER,
    TABLE_FILE,
    WEIGHTS_FILE,
    sae_folders,
)
from everyscope.suite.records import MeasuredOn, SaeRecord, SuiteIndex, read_index, write_index
from everyscope.suite.verify import checksums, counts_identity, verify_cost, verify_file, verify_suite


@dataclass(frozen=True)
class PublishResult:
    """What was published."""

    suite: Path
    """The suite's folder."""
    report: Path
    """Its report, to be opened in a browser."""


def run(config: PublishConfig, *, by_bytes: bool = True) -> PublishResult:
    """Write the suite of all trained SAEs below `config.trained`, again where a file of it is not as it was published.

    That is found by every file's bytes, or, not `by_bytes`, by those of the files alone that were written after suite.json.

    Raises DataError where nothing is trained, where an SAE has no scores yet or scores of an older form, or where a slice is
    about something else; StorageError where the disk is too small.
    """
    result = PublishResult(config.out, config.out / REPORT_FILE)
    sources = find_targets(config)
    described = described_files(config.descriptions, sources)
    inputs = _inputs(config, sources, described)
    if _is_published(config.out, inputs, by_bytes):
        return result
    check_descriptions(config.descriptions, described)
    make_folder(config.out)
    needed = sum(2 * (source.trained / TENSOR_FILE).stat().st_size for source in sources)
    require_free_space(config.out, needed, "publishing the suite")
    (config.out / INDEX_FILE).unlink(missing_ok=True)
    _remove_stale(config.out, {source.folder for source in sources})
    records, results = [], []
    with meter("publish", len(sources), "SAEs") as progress:
        for source in sources:
            record, result_file = _publish_sae(config, source, described[source.name])
            records.append(record)
            results.append(result_file)
            progress.advance()
    _remove_results(config.out, set(results))
    metrics = sources[0].metrics
    index = SuiteIndex(
        version=version("everyscope"),
        title=config.title,
        model=config.model,
        measured=MeasuredOn(**{name: metrics[name] for name in MeasuredOn.model_fields}),
        inputs=inputs,
        saes=tuple(records),
        files={},
        cost=counts_identity(read_cost(config.scores)),
    )
    names = [*results, *_publish_whole(config, sources, index), *publish_text(config.descriptions, config.out)]
    files = {name: sha256(config.out / name) for name in sorted(names)}
    write_index(config.out, index.model_copy(update={"files": files}))
    return result


def _inputs(config: PublishConfig, sources: Iterable[PublishTarget], described: dict[str, dict[str, Path]]) -> str:
    """Hash of everything that the suite follows from."""
    return content_id(
        {
            "version": version("everyscope"),
            "names": [config.title, config.model, config.license],
            "templates": {path.name: sha256(path) for path in sorted(TEMPLATES.iterdir())},
            "saes": {source.folder: source.checksums for source in sources},
            "canonical": [source.folder for source in sources if source.is_canonical],
            "slices": slice_checksums(config.scores),
            "descriptions": description_checksums(config.descriptions, described),
            "cost": counts_identity(read_cost(config.scores)),
        }
    )


def _is_published(suite: Path, inputs: str, by_bytes: bool) -> bool:
    """True where `suite` was made from the very same inputs and its files are those that were published."""
    if not (suite / INDEX_FILE).exists():
        return False
    try:
        index = read_index(suite)
        if index.inputs != inputs:
            return False
        if by_bytes:
            verify_suite(suite)
            return True
        published = (suite / INDEX_FILE).stat().st_mtime_ns
        for name, checksum in checksums(index).items():
            if not (suite / name).is_file() or (suite / name).stat().st_mtime_ns > published:
                verify_file(suite / name, checksum)
        verify_cost(suite, index)
    except DataError as error:
        say(f"  {error}"[:300].partition("; ")[0] + "; the suite is published again")
        return False
    return True


def _remove_stale(suite: Path, folders: set[str]) -> None:
    """Delete our own files from SAE folders that are not published any more; whatever else lies there stays."""
    for folder in sae_folders(suite):
        if folder.relative_to(suite).as_posix() not in folders:
            for name in SAE_FILES:
                (folder / name).unlink(missing_ok=True)
                (folder / (name + PARTIAL)).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _remove_results(suite: Path, names: set[str]) -> None:
    """Delete SAEBench results of SAEs that are not published any more."""
    for path in (suite / SAEBENCH_FOLDER).glob("*_eval_results.json"):
        if path.relative_to(suite).as_posix() not in names:
            path.unlink()


def _publish_sae(config: PublishConfig, source: PublishTarget, described: dict[str, Path]) -> tuple[SaeRecord, str]:
    """Write the folder of one SAE and its SAEBench results; its record and their path."""
    folder, metrics = config.out / source.folder, source.metrics
    sae, record = read_sae(source.trained)
    gemma_scope.write(folder, sae)
    write_saelens(folder, sae, source.site, config.model, record, metrics)
    for name, path in {METRICS_FILE: source.scores / METRICS_FILE, **described}.items():
        with whole_file(folder / name) as partial, storage_errors(folder / name):
            shutil.copyfile(path, partial)
    names = {NPZ_FILE, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, *described}
    for name in set(SAE_FILES) - names:
        (folder / name).unlink(missing_ok=True)
    result_file = write_saebench(config.out, config.title, version("everyscope"), source, sae, record)
    published = SaeRecord(
        folder=source.folder,
        name=source.trained.name,
        site=source.site.kind,
        layer=source.site.layer,
        d_in=sae.d_in,
        width=sae.d_sae,
        num_tokens=record.get("num_tokens"),
        metrics=source.headline,
        files={name: sha256(folder / name) for name in SAE_FILES if name in names},
    )
    return published, result_file


def _publish_whole(config: PublishConfig, sources: Iterable[PublishTarget], index: SuiteIndex) -> list[str]:
    """Write what belongs to no one SAE: slices, table, report and card; the paths of all with a checksum."""
    metrics = {source.folder: source.metrics for source in sources}
    slices = publish_slices(config.scores, config.out, {source.name: source.folder for source in sources})
    evidence = Evidence(index, metrics, slices, publish_cost(config.scores, config.out))
    write_flat_table(config.out, index.saes, metrics)
    report = write_report(config.out, evidence)
    write_card(config.out, index, config.license)
    return [CARD_FILE, TABLE_FILE, *report, *published_slices(config.out)]
