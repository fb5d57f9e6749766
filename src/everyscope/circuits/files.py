"""Graphs as sealed files: arrays in the safetensors layout, facts as JSON in its header. Torch-free; `writing` writes them.

A file may come from anybody. What is read is checked: columns of one length, numbers in range, edges from lower to higher levels.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from everyscope.base.errors import DamagedData
from everyscope.base.schema import one_line
from everyscope.base.tensors import opened_tensors, read_header
from everyscope.circuits.graph import COLUMNS, LATENT, LOGIT, TOKEN, Graph, GraphFacts
from everyscope.circuits.influence import Edges

ENDING = ".graph.safetensors"
FOLDER = "circuits"
"""Where a suite keeps its graphs."""
REMEDY = "compute it again with `everyscope circuit`"
FORMAT = "1"
"""Raised when the columns mean something else."""
LONGEST_SLUG = 40
WHOLE = ("kind", "layer", "position", "index", "coder")
"""Columns of whole numbers."""


def graphs_in(suite: Path) -> dict[str, Path]:
    """The graphs beside a suite's SAEs, by the name of their file without its ending."""
    return {path.name.removesuffix(ENDING): path for path in sorted((suite / FOLDER).glob(f"*{ENDING}")) if path.is_file()}


def slug_of(prompt: str, more: str = "") -> str:
    """A short name for a graph's file: the prompt's letters and digits, and a hash of all of it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[-LONGEST_SLUG:].strip("-")
    digest = hashlib.sha256(f"{prompt}\0{more}".encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{words}-{digest}" if words else digest


def read_facts(path: Path) -> GraphFacts:
    """What a graph's file says of itself, unchecked: for lists. DamagedData for a file that says nothing."""
    metadata = read_header(path).get("__metadata__")
    try:
        return GraphFacts.model_validate_json((metadata or {})["facts"])
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise DamagedData(f"{path}: is no graph; {REMEDY}") from error


def read_graph(path: Path) -> Graph:
    """The graph in a file; DamagedData, in one line, for one that was changed or holds no graph."""
    with opened_tensors(path, "np", remedy=REMEDY) as file:
        metadata: dict[str, Any] = file.metadata() or {}
        if metadata.get("format_of_graph") != FORMAT:
            raise DamagedData(f"{path}: is no graph of format {FORMAT}; {REMEDY}")
        columns = {name: file.get_tensor(name) for name in COLUMNS}
        source, target, weight = (file.get_tensor(name) for name in ("source", "target", "weight"))
    try:
        facts = GraphFacts.model_validate_json(metadata["facts"])
    except (ValidationError, KeyError) as error:
        reason = one_line(error) if isinstance(error, ValidationError) else "it says nothing"
        raise DamagedData(f"{path}: its metadata is invalid ({reason[:200]}); {REMEDY}") from error
    typed = {name: array.astype(np.int64 if name in WHOLE else np.float64) for name, array in columns.items()}
    graph = Graph(facts, **typed, edges=Edges(source.astype(np.int64), target.astype(np.int64), weight.astype(np.float64)))
    require_sound(graph, path)
    return graph


def require_sound(graph: Graph, name: Path | str) -> None:
    """DamagedData unless every number of a graph is one that a graph can have."""
    context, layers, edges = len(graph.facts.tokens), graph.facts.num_layers, graph.edges
    count = len(graph.kind)
    columns = [getattr(graph, column) for column in COLUMNS]
    is_layered = np.where(graph.kind == TOKEN, graph.layer == -1, (graph.layer >= 0) & (graph.layer <= layers))
    widths = np.array([coder.width for coder in graph.facts.coders] or [0])
    is_latent = graph.kind == LATENT
    rules = {
        "columns differ in length": all(column.shape == (count,) for column in columns),
        "edges differ in length": edges.source.shape == edges.target.shape == edges.weight.shape,
        "numbers are not finite": all(np.isfinite(column).all() for column in [*columns, edges.weight]),
    }
    if all(rules.values()):
        ends = np.concatenate([edges.source, edges.target])
        rules |= {
            "kinds are unknown": np.isin(graph.kind, range(LOGIT + 1)).all(),
            "layers are out of range": is_layered.all(),
            "positions are out of range": ((graph.position >= 0) & (graph.position < context)).all(),
            "tokens and their ids differ in number": context == len(graph.facts.token_ids),
            "targets differ in number": (graph.kind == LOGIT).sum() == len(graph.facts.targets),
            "coders are out of range": ((graph.coder >= -1) & (graph.coder < len(graph.facts.coders))).all(),
            "edges lead nowhere": ((ends >= 0) & (ends < count)).all(),
        }
    if all(rules.values()):
        of_coder = widths[np.maximum(graph.coder, 0)]
        rules |= {
            "latents are out of range": bool(
                ((graph.index >= 0) & (graph.index < of_coder) & (graph.coder >= 0))[is_latent].all()
            ),
            "nodes occur twice": len(np.unique(np.stack(columns[: len(WHOLE)]), axis=1).T) == count,
            "edges do not lead upwards": (graph.level[edges.source] < graph.level[edges.target]).all(),
        }
    wrong = next((rule for rule, holds in rules.items() if not holds), None)
    if wrong is not None:
        raise DamagedData(f"{name}: holds no graph: {wrong}; {REMEDY}")
