"""Writing a suite's transcoders for circuit-tracer: the set that it loads, and the feature files that its viewer shows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import human_bytes, make_folder, read_object, write_json
from everyscope.base.progress import meter
from everyscope.base.table_trial import Tried
from everyscope.publish.circuit_tracer.config import CircuitTracerConfig
from everyscope.publish.circuit_tracer.features import Layer, write_index, write_layer
from everyscope.publish.described import REMEDY, SuiteText, latent_tables, read_text, text_tables
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.norms import mlp_norm_of
from everyscope.suite.formats.circuit_tracer import write as write_set
from everyscope.suite.layout import EXPLANATIONS_FILE, LATENTS_FILE, suite_folder
from everyscope.suite.reader import load_sae, model_of
from everyscope.suite.records import SaeRecord, SuiteIndex, read_index
from everyscope.suite.verify import verify_file

FEATURE = "cross layer transcoder"
"""The type of nodes that are latents, of transcoders of one layer too."""
NODE = re.compile(r"(\d+)_(\d+)_\d+")
"""A latent's node: layer, latent, position."""


def label_graph(path: Path, labels: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Write labels, by layer and latent, on nodes of a graph file that have none; how many got one, of how many latents' nodes.

    DataError where the file is no graph.
    """
    graph = read_object(path)
    nodes = graph.get("nodes")
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise DataError(f"{path}: has no list of nodes; give a graph file of circuit-tracer, as graph_files/<slug>.json")
    latents = [node for node in nodes if node.get("feature_type") == FEATURE]
    labelled = 0
    for node in latents:
        found = NODE.fullmatch(str(node.get("node_id")))
        label = labels.get(found[1], {}).get(found[2]) if found else None
        if label is not None and not node.get("clerp"):
            node["clerp"] = label
            labelled += 1
    write_json(path, graph)
    return labelled, len(latents)


SITE = "transcoder"


def chosen(config: CircuitTracerConfig, index: SuiteIndex, num_layers: int) -> list[SaeRecord]:
    """One transcoder for each of the model's layers, all of one width; ConfigError where a layer has none."""
    found = [record for record in index.saes if record.site == SITE and fnmatchcase(record.name, config.saes)]
    if not found:
        kinds = ", ".join(sorted({record.site for record in index.saes}))
        named = "" if config.saes == "*" else f" with a name like {config.saes}"
        raise ConfigError(
            f"the suite has no transcoder{named}, only SAEs of {kinds}; train at the site transcoder, or change --saes"
        )
    widths = sorted({record.width for record in found})
    if config.width not in (None, *widths) or (config.width is None and len(widths) > 1):
        raise ConfigError(f"the transcoders have widths {', '.join(map(str, widths))}; choose one with --width")
    found = [record for record in found if config.width in (None, record.width)]
    by_layer = {layer: [record for record in found if record.layer == layer] for layer in range(num_layers)}
    if missing := [layer for layer, records in by_layer.items() if not records]:
        raise ConfigError(
            f"circuit-tracer needs a transcoder of each of the model's {num_layers} layers; there is none of width "
            f"{found[0].width} for layers {', '.join(map(str, missing))}: train those too"
        )
    return [_one(config, records) for records in by_layer.values()]


def _one(config: CircuitTracerConfig, records: Sequence[SaeRecord]) -> SaeRecord:
    if config.l0 is None:
        return min(records, key=lambda record: not record.metrics.is_canonical)
    wanted = config.l0
    return min(records, key=lambda record: abs(record.metrics.l0 - wanted))


FEATURES_FOLDER = "features"


@dataclass(frozen=True)
class CircuitTracerResult:
    """What an export left on disk."""

    out: Path
    """The folder of the set."""
    num_layers: int
    num_latents: int
    """In feature files [latents]."""
    num_labels: int
    """Of them, those with a label [latents]."""
    graphs: dict[Path, tuple[int, int]]
    """By graph file: nodes that got a label, and all nodes of latents."""

    @property
    def words(self) -> str:
        """What there is, in lines for a person."""
        size = human_bytes(sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file()))
        lines = [f"Set     {self.out}  transcoders of {self.num_layers} layers, {size} with features"]
        if self.num_latents:
            folder = self.out / FEATURES_FOLDER
            lines.append(f"Viewer  {folder}  {self.num_latents:,} latents, {self.num_labels:,} with a label")
        lines += [f"Graph   {path}  {labelled} of {total} nodes labelled" for path, (labelled, total) in self.graphs.items()]
        return "\n".join(lines)


def run(config: CircuitTracerConfig, model: ModelConfig | None = None) -> CircuitTracerResult:
    """Write the set, its feature files, and labels on graphs.

    `model` is the suite's language model where its name in suite.json does not find it. Raises ConfigError (no suite, a layer
    without a transcoder, an input that cannot be converted), DataError (not described) and DamagedData, StorageError, and
    ModelError where the input is converted.
    """
    suite = suite_folder(config.suite)
    index, text = read_index(suite), read_text(suite, Tried(text_tables(suite), REMEDY))
    records = chosen(config, index, text.num_layers)
    scan = config.scan or str(make_folder(config.out).resolve())
    name = config.model or index.model
    output = config.output_hook or ("mlp.hook_out" if "qwen3" in name.lower().replace("-", "") else "hook_mlp_out")
    coders = _coders(config, suite, records, model or model_of(suite, index.model))
    write_set(config.out, coders, model=name, output=output, scan=scan)
    layers = _write_features(config, suite, records, text, scan) if config.features else []
    labels = {str(layer): one.labels for layer, one in enumerate(layers)}
    return CircuitTracerResult(
        config.out,
        len(records),
        sum(len(one.offsets) - 1 for one in layers),
        sum(map(len, labels.values())),
        {path: label_graph(path, labels) for path in config.graphs},
    )


def _coders(config: CircuitTracerConfig, suite: Path, records: list[SaeRecord], model: ModelConfig) -> Iterator[Sae]:
    """The transcoders, one at a time, in the form of input asked for; the language model is loaded only to convert them."""
    adapter = None
    for record in records:
        coder = load_sae(suite / record.folder)
        if config.input not in ("as_trained", coder.metadata.convention):
            adapter = adapter or load_language_model(model).adapter
            norm = mlp_norm_of(adapter, record.layer)
            coder = to_convention(coder, config.input, norm.gain, norm.bias)  # pyright: ignore[reportArgumentType]
        yield coder


def _write_features(
    config: CircuitTracerConfig, suite: Path, records: list[SaeRecord], text: SuiteText, scan: str
) -> list[Layer]:
    folder, layers = config.out / FEATURES_FOLDER, list[Layer]()
    tables = Tried([path for record in records for path in latent_tables(suite / record.folder)], REMEDY)
    with meter("circuit-tracer", sum(record.width for record in records), "latents") as progress:
        for layer, record in enumerate(records):
            home = suite / record.folder
            for name in (LATENTS_FILE, EXPLANATIONS_FILE):
                if name in record.files:
                    verify_file(home / name, record.files[name])
                    tables.require(home / name)
            has_labels = EXPLANATIONS_FILE in record.files
            layers.append(write_layer(folder, layer, home, record.width, text, has_labels, scan, progress))
    write_index(folder, layers)
    return layers
