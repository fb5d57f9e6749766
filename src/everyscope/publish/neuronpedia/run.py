"""Writing a suite for Neuronpedia, source by source, and sending it where that is asked for.

A source is finished when its manifest, sources/<source>.json, exists: it is written last and says what the source was made from.
A second run skips finished sources, and after a kill the source under way is written again.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everyscope.base.errors import DataError
from everyscope.base.files import human_bytes, parse_object, read_json, read_object, write_json, write_text
from everyscope.base.ids import content_id
from everyscope.base.progress import Meter, meter, say
from everyscope.base.table_trial import Tried
from everyscope.base.tables import opened_table
from everyscope.publish.described import REMEDY, SuiteText, latent_tables, read_firings, read_latents, read_text, text_tables
from everyscope.publish.json_text import encoded
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.files import MAX_FILES, METADATA_FILES, Batches, Bodies, latents_per_file
from everyscope.publish.neuronpedia.metadata import hook_name, metadata_rows, model_body, set_body
from everyscope.publish.neuronpedia.names import NeuronpediaSource, one_per_set, sources_of
from everyscope.publish.neuronpedia.rows import Rows
from everyscope.publish.neuronpedia.upload import UploadResult, upload
from everyscope.suite.layout import CONFIG_FILE, EXPLANATIONS_FILE, LATENTS_FILE, suite_folder
from everyscope.suite.records import SuiteIndex, read_index
from everyscope.suite.verify import verify_file

VERSION = 1
"""Part of every identity; raised when the same suite would give other files."""
NAMING = {"suite", "out", "saes", "upload", "host", "dry_run", "create_model", "retries", "backoff_s", "timeout_s"}
"""Fields of the config on which no source's content depends."""
KINDS = ("features", "activations", "explanations")
BULK_FOLDER, UPLOAD_FOLDER, MANIFEST_FOLDER = "v1", "upload", "sources"


@dataclass(frozen=True)
class NeuronpediaResult:
    """What an export left on disk, earlier runs included."""

    out: Path
    """The folder."""
    sources: tuple[dict[str, Any], ...]
    """The manifest of each source."""
    num_skipped: int
    """Sources that were finished already."""
    upload: UploadResult | None
    """What was sent, or would be; None where nothing was to be."""

    def total(self, name: str) -> int:
        """The sum over all sources of a manifest's count: latents, activations, explanations, files, bytes, bodies."""
        return sum(source["counts"][name] for source in self.sources)

    @property
    def words(self) -> str:
        """The result in lines for a person."""
        rows = ", ".join(f"{self.total(name):,} {name}" for name in ("latents", "activations", "explanations"))
        lines = [
            f"{len(self.sources)} sources ({self.num_skipped} finished before): {rows}",
            f"Bulk    {self.out / BULK_FOLDER}  {self.total('files')} files, {human_bytes(self.total('bytes'))}",
            f"Bodies  {self.out / UPLOAD_FOLDER}  {self.total('bodies')} bodies, {human_bytes(self.total('body_bytes'))}",
        ]
        if self.upload is not None:
            done = "Would send" if self.upload.is_dry else "Sent"
            lines.append(f"{done} {self.upload.num_features:,} features in {self.upload.num_bodies} bodies to {self.upload.host}")
        return "\n".join(lines)


def run(config: NeuronpediaConfig) -> NeuronpediaResult:
    """Write every source that is not finished, then send what is asked for.

    Raises ConfigError (no suite, nothing chosen, a name that cannot be made), DataError (not described) and DamagedData,
    StorageError, and those of `upload`.
    """
    suite = suite_folder(config.suite)
    index = read_index(suite)
    sources = sources_of(config, index)
    found = [_finished(config, source, identity(config, index, source)) for source in sources]
    todo = [source for source, manifest in zip(sources, found, strict=True) if manifest is None]
    tables = Tried(
        [*text_tables(suite), *(path for source in todo for path in latent_tables(suite / source.record.folder))], REMEDY
    )
    text = read_text(suite, tables)
    manifests = []
    with meter("neuronpedia", sum(source.record.width for source in sources), "latents") as progress:
        for source, manifest in zip(sources, found, strict=True):
            if manifest is None:
                manifest = _Export(config, suite, index, source, text, tables).write(progress)
            else:
                progress.advance(source.record.width, is_resumed=True)
            manifests.append(manifest)
    api = [source for source in sources if source.is_for_api]
    if left_out := len(sources) - len(api):
        say(f"  The API takes one SAE for each layer of a set: {left_out} of {len(sources)} are in {BULK_FOLDER}/ alone")
    heads = _write_heads(config, index, text, api)
    sent = upload(config, heads, [manifests[sources.index(source)] for source in api]) if config.upload else None
    return NeuronpediaResult(config.out, tuple(manifests), len(found) - len(todo), sent)


def identity(config: NeuronpediaConfig, index: SuiteIndex, source: NeuronpediaSource) -> str:
    """Hash of everything that determines a source's files."""
    text = {name: checksum for name, checksum in index.files.items() if name.startswith("text/")}
    described = index.model_copy(update={"saes": (), "files": {}, "inputs": ""}).as_json()
    own = {"id": source.id, "model": source.model_id, "record": source.record.as_json()}
    return content_id(
        {"version": VERSION, **config.model_dump(mode="json", exclude=NAMING), "suite": described, "text": text, **own}
    )


def _finished(config: NeuronpediaConfig, source: NeuronpediaSource, identity_: str) -> dict[str, Any] | None:
    """The manifest of a source whose files exist as they would be written now; None where they do not."""
    try:
        manifest = read_json(config.out / MANIFEST_FOLDER / f"{source.id}.json")
        files = {config.out / name: size for name, size in manifest["files"].items()}
        is_same = manifest["identity"] == identity_ and all(path.stat().st_size == size for path, size in files.items())
    except (DataError, KeyError, TypeError, AttributeError, OSError):
        return None
    return manifest if is_same else None


def _write_heads(
    config: NeuronpediaConfig, index: SuiteIndex, text: SuiteText, sources: list[NeuronpediaSource]
) -> dict[str, list[str]]:
    """The bodies that make model and sets known: paths below the export, by the API's route."""
    heads: dict[str, dict[str, Any]] = {"model/new": {}, "source-set/new": {}}
    for source in one_per_set(sources):
        folder = f"{UPLOAD_FOLDER}/{source.model_id}"
        heads["model/new"][f"{folder}/model.json"] = model_body(source, index, text)
        heads["source-set/new"][f"{folder}/sets/{source.set_name}.json"] = set_body(config, source)
    for bodies in heads.values():
        for name, body in bodies.items():
            write_text(config.out / name, encoded(body) + "\n")
    return {route: list(bodies) for route, bodies in heads.items()}


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
    ) -> None:
        self._config, self._index, self._source, self._text, self._tables = config, index, source, text, tables
        self._home = suite / source.record.folder
        self._bulk = config.out / BULK_FOLDER / source.model_id / source.id
        self._bodies = Bodies(config.out, source, config)

    def write(self, progress: Meter) -> dict[str, Any]:
        """Everything, the manifest last; the manifest."""
        path = self._config.out / MANIFEST_FOLDER / f"{self._source.id}.json"
        path.unlink(missing_ok=True)
        for name in (LATENTS_FILE, EXPLANATIONS_FILE, CONFIG_FILE):
            if name in self._source.record.files:
                verify_file(self._home / name, self._source.record.files[name])
            self._tables.require(self._home / name)
        saelens = read_object(self._home / CONFIG_FILE)
        counts = self._write_latents(hook_name(self._source, saelens), progress)
        self._write_metadata(saelens)
        bodies = [asdict(body) for body in self._bodies.written]
        files = self._remove_others(counts.pop("names") | {body["path"] for body in bodies})
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

    def _write_latents(self, hook: str, progress: Meter) -> dict[str, Any]:
        config, source, width = self._config, self._source, self._source.record.width
        per_file = latents_per_file(width, len(KINDS), config.latents_per_file)
        has_labels = EXPLANATIONS_FILE in source.record.files
        rows = Rows(self._text, source, config, hook, read_firings(self._home))
        with ExitStack() as stack:
            batches = {kind: Batches(self._bulk / kind, per_file, config.max_file_bytes) for kind in KINDS}
            for its in batches.values():
                stack.enter_context(its)
            for latent in read_latents(self._home, width, self._text, has_labels):
                batches["features"].write(latent.number, [rows.feature(latent)])
                batches["activations"].write(latent.number, rows.activations(latent))
                batches["explanations"].write(latent.number, rows.explanations(latent))
                if source.is_for_api and (feature := rows.for_api(latent)) is not None:
                    self._bodies.add(latent.number, feature)
                progress.advance(1)
        self._bodies.flush()
        return {
            "activations": batches["activations"].num_rows,
            "explanations": batches["explanations"].num_rows,
            "latents": batches["features"].num_rows,
            "unpacked_bytes": sum(its.num_bytes for its in batches.values()),
            "api_features": sum(body.num_features for body in self._bodies.written),
            "names": {
                (self._bulk / kind / name).relative_to(config.out).as_posix()
                for kind, its in batches.items()
                for name in its.names
            },
        }

    def _write_metadata(self, saelens: dict[str, Any]) -> None:
        path = self._home / LATENTS_FILE
        metadata = opened_table(path, REMEDY).schema_arrow.metadata or {}
        facts = parse_object(metadata.get(b"everyscope", b"{}"), path)
        rows = metadata_rows(self._config, self._index, self._source, self._text, saelens, facts)
        assert len(rows) == METADATA_FILES, list(rows)
        for name, row in rows.items():
            write_text(self._bulk / name, encoded(row) + "\n")

    def _remove_others(self, kept: set[str]) -> dict[str, int]:
        """Delete what an earlier run left in this source's folders; the size of each file that stays, by path."""
        out, source, sizes = self._config.out, self._source, dict[str, int]()
        for folder in (self._bulk, out / UPLOAD_FOLDER / source.model_id / source.id):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(out).as_posix()
                if name in kept or (path.parent == self._bulk and path.suffix == ".jsonl"):
                    sizes[name] = path.stat().st_size
                else:
                    path.unlink()
        return sizes
