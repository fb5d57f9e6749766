"""`everyscope circuit`: a graph of a prompt or of another program's file, and what to read first in it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from everyscope.base.errors import ConfigError
from everyscope.base.files import read_object, whole_file, write_json
from everyscope.base.progress import printable
from everyscope.circuits.choosing import labels_of, named
from everyscope.circuits.circuit_tracer import from_json, to_json
from everyscope.circuits.config import AttributionConfig, Contrast, Latent, Target, TargetTokens
from everyscope.circuits.files import ENDING, FOLDER, read_graph, slug_of
from everyscope.circuits.graph import LARGEST_VIOLATION, LATENT, LOGIT, Graph
from everyscope.circuits.paths import strongest_paths
from everyscope.suite.layout import suite_folder
from everyscope.suite.records import read_index

if TYPE_CHECKING:
    from everyscope.circuits.validation import Validation

SHOWN = 12
"""Rows of each table [rows]."""
Labels = dict[tuple[int, int], str]
Tested = dict[str, "Validation"]
"""What removing latents showed: in the model as it is (free), and with attention and norms held as in the graph."""


def circuit_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Compute or import, write, and show."""
    suite = suite_folder(options.path)
    for name, value in (("--node-share", options.node_share), ("--edge-share", options.edge_share)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} {value}: expected more than 0, at most 1")
    graph, slug, tested = imported(options) if options.import_file is not None else computed(options, suite)
    from everyscope.circuits.writing import write_graph

    path: Path = options.out or suite / FOLDER / f"{slug}{ENDING}"
    write_graph(path, graph)
    labels, pruned = labels_of(suite, graph), graph.pruned(options.node_share, options.edge_share)
    if options.circuit_tracer is not None:
        write_json(options.circuit_tracer, to_json(pruned, slug, labels, read_index(suite).title, options.node_share))
    if options.export is not None:
        export_page(options.export, suite, slug, graph)
    if options.json:
        print(json.dumps(as_json(path, graph, pruned, labels, tested), indent=2))
    else:
        show(Console(), path, graph, pruned, labels, tested, options.export)


def computed(options: argparse.Namespace, suite: Path) -> tuple[Graph, str, Tested]:
    """The graph of a prompt, the name of its file, and what removing latents showed."""
    if not options.prompt:
        raise ConfigError(
            f'everyscope circuit {options.path} needs a PROMPT: the text whose next token is explained, in "quotes"'
        )
    target = target_of(options)
    chosen = {} if options.max_latents is None else {"max_latents": options.max_latents}
    if options.max_latents is not None and options.max_latents < 1:
        raise ConfigError(f"--max-latents {options.max_latents}: expected 1 or more")
    from everyscope.circuits.attribution import attribute
    from everyscope.circuits.choosing import coders_of
    from everyscope.circuits.validation import validate
    from everyscope.sites.config import ModelConfig
    from everyscope.sites.model import load_language_model, quiet_transformers
    from everyscope.suite.reader import load_suite, model_of

    quiet_transformers()
    loaded = load_suite(suite)
    coders = coders_of(loaded, options.through, width=options.width, l0=options.l0)
    known = model_of(suite, loaded.index.model) if options.model is None else ModelConfig(name=options.model)
    model = load_language_model(known.model_copy(update={"dtype": "float32"}))
    graph = attribute(model, coders, options.prompt, target=target, config=AttributionConfig(**chosen))
    tested: Tested = {}
    if options.validate:
        for name, is_held in (("free", False), ("held", True)):
            held = {"freezes_attention": is_held, "freezes_norms": is_held}
            tested[name] = validate(model, coders, graph, num_latents=options.validate, **held)
    more = "" if target is None else repr(target)
    return graph, slug_of(options.prompt, more if options.through is None else f"{more} {options.through}"), tested


def imported(options: argparse.Namespace) -> tuple[Graph, str, Tested]:
    """The graph of circuit-tracer's JSON, or of a file written before, and the name of its file."""
    asked = ("target", "against", "latent", "through", "width", "l0", "max_latents", "model", "validate", "prompt")
    given = [name for name in asked if getattr(options, name) not in (None, 0)]
    both = next(("PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}" for name in given), None)
    if both is not None:
        raise ConfigError(f"--import and {both}: a graph that is imported is not computed; leave one out")
    path: Path = options.import_file
    if path.name.endswith(ENDING):
        return read_graph(path), path.name.removesuffix(ENDING), {}
    graph = from_json(read_object(path), str(path))
    return graph, slug_of(graph.facts.prompt, path.stem), {}


def export_page(out: Path, suite: Path, slug: str, graph: Graph) -> None:
    """Write the graph's page as one file; indexes the suite for labels and examples if nobody has."""
    from everyscope.browse.circuit_file import circuit_file
    from everyscope.browse.preparation import Preparation

    page = circuit_file(Preparation(suite, None).run(), slug, graph)
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")


def target_of(options: argparse.Namespace) -> Target:
    """What the flags ask to be explained; ConfigError where they do not go together."""
    if options.latent is not None:
        if options.target or options.against:
            raise ConfigError("--latent and --target: a graph explains a latent or next tokens; leave one out")
        return Latent.parse(options.latent)
    if options.against is not None:
        if len(options.target or ()) != 1:
            raise ConfigError("--against needs one --target: the token whose logit is compared")
        return Contrast(options.target[0], options.against)
    return TargetTokens(tuple(options.target)) if options.target else None


def as_json(path: Path, graph: Graph, pruned: Graph, labels: Labels, tested: "Tested") -> dict[str, Any]:
    """What is printed, for programs."""
    paths = strongest_paths(pruned, SHOWN)
    return {
        "graph": str(path),
        "prompt": graph.facts.prompt,
        "tokens": list(graph.facts.tokens),
        "replacement": graph.facts.replacement,
        "completeness": graph.facts.completeness,
        "coverage": graph.coverage,
        "violation": graph.largest_violation,
        "logit_error": graph.facts.logit_error,
        "num_active": graph.facts.num_active,
        "nodes": len(pruned),
        "edges": len(pruned.edges.source),
        "targets": [target.as_json() for target in graph.facts.targets],
        "latents": [
            {
                "layer": int(pruned.layer[node]),
                "position": int(pruned.position[node]),
                "latent": int(pruned.index[node]),
                "label": labels.get((int(pruned.coder[node]), int(pruned.index[node]))),
                "influence": float(pruned.influence[node]),
                "activation": float(pruned.activation[node]),
            }
            for node in strongest_latents(pruned)
        ],
        "paths": [
            {"share": one.share, "sign": one.sign, "nodes": [named(pruned, node, labels) for node in one.nodes]} for one in paths
        ],
        "validation": {
            name: {
                "num_latents": len(one.latents),
                "rank_correlation": one.rank_correlation,
                "prediction_correlation": one.prediction_correlation,
            }
            for name, one in tested.items()
        },
    }


def strongest_latents(graph: Graph) -> list[int]:
    """The latents of most influence, best first."""
    nodes = np.flatnonzero(graph.kind == LATENT)
    return nodes[np.argsort(-graph.influence[nodes], kind="stable")][:SHOWN].tolist()


def show(
    console: Console, path: Path, graph: Graph, pruned: Graph, labels: Labels, tested: "Tested", page: Path | None = None
) -> None:
    """What is printed, for people."""

    def safe(words: str) -> str:
        return escape(printable(words))

    targets = ", ".join(f"{target.text!r} {target.probability:.1%}" for target in graph.facts.targets)
    console.print(safe(f"{graph.facts.model} on {graph.facts.prompt!r}: {targets or 'a latent'}"))
    counts = f"{len(pruned)} of {len(graph)} nodes and {len(pruned.edges.source)} edges after pruning"
    console.print(f"{counts}; {(graph.kind == LATENT).sum()} of {graph.facts.num_active} active latents computed")
    is_exact = graph.largest_violation <= LARGEST_VIOLATION
    console.print(safe(graph.words), style=None if is_exact else "bold red")
    for name, one in tested.items():
        console.print(f"{one.words}{', attention and norms held' if name == 'held' else ''}")
    table = Table(title="Strongest latents", title_justify="left", box=None, pad_edge=False)
    for name in ("influence", "activation", "latent"):
        table.add_column(name, justify="left" if name == "latent" else "right")
    for node in strongest_latents(pruned):
        words = safe(named(pruned, node, labels))
        table.add_row(f"{pruned.influence[node] / pruned.start.sum():.1%}", f"{pruned.activation[node]:.3g}", words)
    console.print(table)
    console.print("Strongest paths")
    for one in strongest_paths(pruned, SHOWN):
        steps = " → ".join(named(pruned, node, labels) for node in one.nodes)
        console.print(safe(f"{one.share:6.1%} {'+' if one.sign > 0 else '−'}  {steps}"), highlight=False, soft_wrap=True)
    console.print(f"\nGraph   {path}", highlight=False, soft_wrap=True)
    if page is not None:
        console.print(f"Page    {page}", highlight=False, soft_wrap=True)
    if path.parent.name == FOLDER and (pruned.kind == LOGIT).any():
        console.print(f"Next    everyscope browse {path.parent.parent}", highlight=False, soft_wrap=True)
