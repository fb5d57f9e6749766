"""What describe and explain have left, taken into the suite: tables of latents, labels, and the text that examples point into."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from everyscope.base.errors import DataError
from everyscope.base.files import PARTIAL, read_sealed, sha256, storage_errors, whole_file
from everyscope.base.tables import check_table
from everyscope.publish.targets import PublishTarget
from everyscope.suite.descriptions import ORDER_FILE, read_order
from everyscope.suite.layout import EXPLANATIONS_FILE, LATENTS_FILE, TEXT_FOLDER


def described_files(descriptions: Path | None, sources: Sequence[PublishTarget]) -> dict[str, dict[str, Path]]:
    """By name of each SAE: its table of latents (the one of its scores, where nothing is described) and its labels, if any.

    DataError where descriptions number other SAEs than these, or lack one of them.
    """
    if descriptions is None or not (descriptions / ORDER_FILE).is_file():
        return {source.name: {LATENTS_FILE: source.scores / LATENTS_FILE} for source in sources}
    if read_order(descriptions) != [(source.site, source.trained.name) for source in sources]:
        raise DataError(f"{descriptions}: describes other SAEs, or in another order; run `everyscope describe` again")
    found = {}
    for source in sources:
        files, labels = {LATENTS_FILE: descriptions / source.name / LATENTS_FILE}, descriptions / source.name / EXPLANATIONS_FILE
        files |= {EXPLANATIONS_FILE: labels} if labels.is_file() else {}
        if not files[LATENTS_FILE].is_file():
            raise DataError(f"{files[LATENTS_FILE]}: missing, the description is not finished; run `everyscope describe` again")
        found[source.name] = files
    return found


def text_files(descriptions: Path | None) -> list[Path]:
    """The files of the text that examples point into."""
    return [] if descriptions is None else sorted(path for path in (descriptions / TEXT_FOLDER).glob("*") if _is_whole(path))


def description_checksums(descriptions: Path | None, files: dict[str, dict[str, Path]]) -> dict[str, str]:
    """Hashes of all that is published of descriptions."""
    tables = {f"{name}/{file}": sha256(path) for name, its in files.items() for file, path in its.items()}
    return tables | {path.name: sha256(path) for path in text_files(descriptions)}


def check_descriptions(descriptions: Path | None, files: dict[str, dict[str, Path]]) -> None:
    """DamagedData where a table, or the text that it points into, is not what was written."""
    tables = [path for its in files.values() for path in its.values()]
    for path in [*tables, *text_files(descriptions)]:
        if path.suffix == ".parquet":
            check_table(path, "delete it and run the same command again")
        else:
            read_sealed(path, "delete it and run `everyscope describe` again")


def publish_text(descriptions: Path | None, suite: Path) -> list[str]:
    """Copy the text, and take away what no description points into any more; the paths below the suite."""
    names = [path.name for path in text_files(descriptions)]
    for path in text_files(descriptions):
        target = suite / TEXT_FOLDER / path.name
        with whole_file(target) as partial, storage_errors(target):
            shutil.copyfile(path, partial)
    for path in (suite / TEXT_FOLDER).glob("*"):
        if path.name not in names:
            path.unlink()
    return [f"{TEXT_FOLDER}/{name}" for name in names]


def _is_whole(path: Path) -> bool:
    return path.is_file() and not path.name.endswith(PARTIAL)
