"""Writing a suite for Neuronpedia, source by source, and sending it where that is asked for.

A source is whole when its manifest, sources/<source>.json, is there: it is written last and says what the source was made from.
A second run skips what is whole, and a killed one begins again with the source that it was at.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import human_bytes, parse_object, read_json, read_object, sha256, write_json, write_text
from everyscope.base.ids import content_id
from everyscope.base.progress import Meter, meter, say
from everyscope.base.table_trial import Tried
from everyscope.base.tables import opened_table
from everyscope.publish.neuronpedia.batches import MAX_FILES, METADATA_FILES, Batches, latents_per_file
from everyscope.publish.neuronpedia.bodies import Bodies, feature_objects
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.examples import read_examples
from everyscope.publish.neuronpedia.json_columns import constant
from everyscope.publish.neuronpedia.latents import REMEDY, Labels, damaged, read_firings, read_latents
from everyscope.publish.neuronpedia.metadata import hook_name, metadata_rows, model_body, set_body
from everyscope.publish.neuronpedia.names import NeuronpediaSource, one_per_set, sources_of
from everyscope.publish.neuronpedia.rows import activation_rows, explanation_rows, feature_rows
from everyscope.publish.neuronpedia.text import SuiteText, read_text, text_tables
from everyscope.publish.neuronpedia.upload import UploadResult, upload
from everyscope.suite.layout import CONFIG_FILE, EXPLANATIONS_FILE, INDEX_FILE, LATENTS_FILE, suite_folder
from everyscope.suite.records import SuiteIndex, read_index

VERSION = 1
"""Part of every identity; raised when the same suite would give other files."""
NAMING = {"suite", "out", "saes", "upload", "host", "dry_run", "create_model", "retries", "backoff_s", "timeout_s"}
"""Fields of the config on which no source's content depends."""
BULK_FOLDER, UPLOAD_FOLDER, MANIFEST_FOLDER = "v1", "upload", "sources"


@dataclass(frozen=True)
class NeuronpediaResult:
    """What an export left on disk, earlier runs included."""

    out: Path
    """The folder."""
    sources: tuple[dict[str, Any], ...]
    """The manifest of each source."""
    num_skipped: int
    """Sources that were whole already."""
    upload: UploadResult | None
    """What was sent, or would be; None where nothing was to be."""

    def total(self, name: str) -> int:
        """The sum over all sources of a manifest's count: latents, activations, explanations, files, bytes, bodies."""
        return sum(source["counts"][name] for source in self.sources)

    @property
    def words(self) -> str:
        """What there is, and what was sent, in lines for a person."""
        rows = ", ".join(f"{self.total(name):,} {name}" for name in ("latents", "activations", "explanations"))
        lines = [
            f"{len(self.sources)} sources ({self.num_skipped} were there): {rows}",
            f"Bulk    {self.out / BULK_FOLDER}  {self.total('files')} files, {human_bytes(self.total('bytes'))}",
            f"Bodies  {self.out / UPLOAD_FOLDER}  {self.total('bodies')} bodies, {human_bytes(self.total('body_bytes'))}",
        ]
        if self.upload is not None:
            done = "Would send" if self.upload.is_dry else "Sent"
            lines.append(f"{done} {self.upload.num_features:,} features in {self.upload.num_bodies} bodies to {self.upload.host}")
        return "\n".join(lines)


def run(config: NeuronpediaConfig) -> NeuronpediaResult:
    """Write every source that is not there yet, then send what is asked for.

    Raises ConfigError (no suite, nothing chosen, a name that cannot be made), DataError (not described) and DamagedData,
    StorageError, and those of `upload`.
    """
    suite = suite_folder(config.suite)
    index = read_index(suite)
    sources = sources_of(config, index)
    found = [_whole(config, source, identity(config, index, source)) for source in sources]
    tables = Tried([*text_tables(suite), *_tables(suite, sources, found)], REMEDY)
    text = read_text(suite, tables)
    manifests = []
    with meter("neuronpedia", sum(source.record.width for source in sources), "latents") as progress:
        for source, whole in zip(sources, found, strict=True):
            if whole is None:
                manifests.append(_Export(config, suite, index, source, text, tables, progress).write())
            else:
                manifests.append(whole)
                progress.advance(source.record.width, is_resumed=True)
    api = [source for source in sources if source.is_for_api]
    if left_out := len(sources) - len(api):
        say(f"  The API takes one SAE for each layer of a set: {left_out} of {len(sources)} are in {BULK_FOLDER}/ alone")
    heads = _write_heads(config, index, text, api)
    sent = upload(config, heads, [manifests[sources.index(source)] for source in api]) if config.upload else None
    return NeuronpediaResult(config.out, tuple(manifests), len(found) - found.count(None), sent)


def _tables(suite: Path, sources: Sequence[NeuronpediaSource], found: Sequence[dict[str, Any] | None]) -> list[Path]:
    """The tables of the sources of which nothing was `found`."""
    folders = [suite / source.record.folder for source, whole in zip(sources, found, strict=True) if whole is None]
    paths = [folder / name for folder in folders for name in (LATENTS_FILE, EXPLANATIONS_FILE)]
    return [path for path in paths if path.is_file()]


def identity(config: NeuronpediaConfig, index: SuiteIndex, source: NeuronpediaSource) -> str:
    """Hash of all that decides a source's files."""
    text = {name: checksum for name, checksum in index.files.items() if name.startswith("text/")}
    described = index.model_copy(update={"saes": (), "files": {}, "inputs": ""}).as_json()
    own = {"id": source.id, "model": source.model_id, "record": source.record.as_json()}
    return content_id(
        {"version": VERSION, **config.model_dump(mode="json", exclude=NAMING), "suite": described, "text": text, **own}
    )


def _whole(config: NeuronpediaConfig, source: NeuronpediaSource, identity_: str) -> dict[str, Any] | None:
    """The manifest of a source that is there as it would be written now; None where it is not."""
    path = config.out / MANIFEST_FOLDER / f"{source.id}.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        is_same = manifest["identity"] == identity_
        return (
            manifest if is_same and all(_has_size(config.out / name, size) for name, size in manifest["files"].items()) else None
        )
    except (DataError, KeyError, TypeError, AttributeError):
        return None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_heads(
    config: NeuronpediaConfig, index: SuiteIndex, text: SuiteText, sources: list[NeuronpediaSource]
) -> dict[str, list[str]]:
    """The bodies that make model and sets known: paths below the export, by the API's route."""
    heads: dict[str, list[str]] = {"model/new": [], "source-set/new": []}
    for source in one_per_set(sources):
        folder = f"{UPLOAD_FOLDER}/{source.model_id}"
        for route, name, body in (
            ("model/new", f"{folder}/model.json", model_body(source, index, text)),
            ("source-set/new", f"{folder}/sets/{source.set_name}.json", set_body(config, source)),
        ):
            write_text(config.out / name, constant(body) + "\n")
            if name not in heads[route]:
                heads[route].append(name)
    return heads


class _Export:
    """Writes one source."""

    def __init__(
        self,
        config: NeuronpediaConfig,
        suite: Path,
        index: SuiteIndex,
        source: NeuronpediaSource,
        text: SuiteText,
        tables: Tried,
        progress: Meter,
    ) -> None:
        self._config, self._index, self._source, self._text, self._progress = config, index, source, text, progress
        self._tables = tables
        self._folder = suite / source.record.folder
        self._bulk = config.out / BULK_FOLDER / source.model_id / source.id
        self._bodies = Bodies(config.out, source, config)

    def write(self) -> dict[str, Any]:
        """Everything, the manifest last; the manifest."""
        path = self._config.out / MANIFEST_FOLDER / f"{self._source.id}.json"
        path.unlink(missing_ok=True)
        for name in (LATENTS_FILE, EXPLANATIONS_FILE, CONFIG_FILE):
            self._verify(name)
        try:
            counts = self._write_latents()
        except pyarrow.ArrowException as error:  # numbers of tokens or rows that lead nowhere
            raise damaged(self._folder / LATENTS_FILE, error) from error
        self._write_metadata()
        bodies = [asdict(body) for body in self._bodies.written]
        files = self._remove_others(counts.pop("names"), {body["path"] for body in bodies})
        sizes = [size for name, size in files.items() if name.startswith(f"{BULK_FOLDER}/")]
        if len(sizes) > MAX_FILES:
            raise DataError(
                f"{self._bulk}: has {len(sizes)} files, it may have {MAX_FILES}; raise --latents-per-file or --max-file-bytes"
            )
        manifest = {
            "source": self._source.id,
            "model": self._source.model_id,
            "sae": self._source.record.folder,
            "identity": identity(self._config, self._index, self._source),
            "counts": counts
            | {"files": len(sizes), "bytes": sum(sizes), "bodies": len(bodies), "body_bytes": sum(files.values()) - sum(sizes)},
            "bodies": bodies,
            "files": files,
        }
        write_json(path, manifest)
        return manifest

    def _verify(self, name: str) -> None:
        """DamagedData where a file of the SAE is not the one that was published."""
        path, checksum = self._folder / name, self._source.record.files.get(name)
        if checksum is not None and (not path.is_file() or sha256(path) != checksum):
            raise DamagedData(
                f"{path}: is missing or differs from its checksum in {INDEX_FILE}; publish or download the suite again"
            )
        self._tables.require(path)

    def _write_latents(self) -> dict[str, Any]:
        config, source, text = self._config, self._source, self._text
        path, labels_path = self._folder / LATENTS_FILE, self._folder / EXPLANATIONS_FILE
        labels = Labels(labels_path if labels_path.is_file() else None)
        kinds = ("features", "activations", "explanations")
        per_file = latents_per_file(source.record.width, len(kinds), config.latents_per_file)
        hook, firings = hook_name(source, self._saelens()), None
        with ExitStack() as stack:
            batches = {kind: stack.enter_context(Batches(self._bulk / kind, per_file, config.max_file_bytes)) for kind in kinds}
            for latents in read_latents(path, source.record.width):
                firings = read_firings(path) if firings is None else firings
                examples = read_examples(latents, text, path)
                its_labels = labels.until(latents.first + len(latents))
                rows = (
                    feature_rows(latents, text, source, config, hook, firings),
                    activation_rows(latents, examples, text, source, config),
                    explanation_rows(its_labels, source, config),
                )
                for kind, its_rows in zip(kinds, rows, strict=True):
                    batches[kind].write(latents.first, its_rows)
                if source.is_for_api:
                    self._bodies.add(*feature_objects(latents, examples, its_labels, text, config))
                self._progress.advance(len(latents))
        self._bodies.flush()
        counts: dict[str, Any] = {kind: its.num_rows for kind, its in batches.items()}
        counts["latents"] = counts.pop("features")
        counts["unpacked_bytes"] = sum(its.num_bytes for its in batches.values())
        counts["api_features"] = sum(body.num_features for body in self._bodies.written)
        return counts | {"names": {f"{kind}/{name}" for kind, its in batches.items() for name in its.names}}

    def _saelens(self) -> dict[str, Any]:
        return read_object(self._folder / CONFIG_FILE)

    def _write_metadata(self) -> None:
        path = self._folder / LATENTS_FILE
        metadata = opened_table(path, REMEDY).schema_arrow.metadata or {}
        facts = parse_object(metadata.get(b"everyscope", b"{}"), path)
        rows = metadata_rows(self._config, self._index, self._source, self._text, self._saelens(), facts)
        assert len(rows) == METADATA_FILES, list(rows)
        for name, row in rows.items():
            write_text(self._bulk / name, constant(row) + "\n")

    def _remove_others(self, batches: set[str], bodies: set[str]) -> dict[str, int]:
        """Delete what an earlier run left in this source's folders; the size of each file that stays, by path."""
        out, source = self._config.out, self._source
        kept = {(self._bulk / name).relative_to(out).as_posix() for name in batches} | bodies
        sizes = {}
        for path in _files(self._bulk, out / UPLOAD_FOLDER / source.model_id / source.id):
            name = path.relative_to(out).as_posix()
            if name in kept or (path.parent == self._bulk and path.suffix == ".jsonl"):
                sizes[name] = path.stat().st_size
            else:
                path.unlink()
        return sizes


def _files(*folders: Path) -> Iterator[Path]:
    return (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
