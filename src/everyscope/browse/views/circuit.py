"""Attribution graphs as pages: a list of them, one with everything that its script draws, and the same for circuit-tracer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from everyscope.base.errors import DataError
from everyscope.browse.links import Links
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index
from everyscope.circuits.circuit_tracer import to_json
from everyscope.circuits.files import read_facts, read_graph
from everyscope.circuits.graph import KINDS, LARGEST_VIOLATION, LATENT, LOGIT, Graph
from everyscope.circuits.influence import cumulative

NODE_SHARE, EDGE_SHARE = 0.98, 0.995
"""Of the influence, what the page gets of nodes and edges; its sliders take away from that [1]."""
MAX_EDGES = 12_000
"""Edges that a page gets, the strongest [edges]."""
LISTED = 300
"""Graphs in a list, the first by name [graphs]."""
FOREIGN_NODE_SHARE = 0.8


def circuits_view(graphs: Mapping[str, Path], links: Links) -> dict[str, Any]:
    """Graphs of a suite by name; one that cannot be read says so."""
    rows = []
    for name, path in list(graphs.items())[:LISTED]:
        try:
            facts = read_facts(path)
        except DataError as error:
            rows.append({"name": name, "href": None, "problem": str(error)})
        else:
            rows.append(
                {"name": name, "href": links.circuit(name), "problem": "", "facts": facts, "is_exact": is_exact(facts.violation)}
            )
            rows[-1]["targets"] = [(shown(target.text), target.probability) for target in facts.targets[:3]]
    return {"graphs": rows, "new": links.circuit("new")}


def is_exact(violation: float) -> bool:
    """Whether a graph keeps its own sums well enough to be trusted."""
    return violation <= LARGEST_VIOLATION


def circuit_view(links: Links, name: str, path: Path) -> dict[str, Any]:
    """What the page says around the drawing; DamagedData where the file is no graph."""
    graph = read_graph(path)
    return {
        "graph": graph,
        "facts": graph.facts,
        "targets": [(shown(target.text), target.probability) for target in graph.facts.targets],
        "is_exact": is_exact(graph.largest_violation),
        "num_latents": int((graph.kind == LATENT).sum()),
        "data": links.circuit(name, ".json"),
        "foreign": links.circuit(name, "/circuit-tracer.json"),
    }


def shown(text: str) -> str:
    """A token in which nothing is invisible."""
    return Piece(0, text.encode("utf-8", "surrogatepass"), False).plain


def labels_in(index: Index, graph: Graph) -> dict[int, dict[str, Any]]:
    """What the suite calls the latents of a graph, by node: `label`, or None, and the tokens it fires most on."""
    nodes = np.flatnonzero(graph.kind == LATENT).tolist()
    places = {node: (index.find(graph.facts.coders[int(graph.coder[node])].name), int(graph.index[node])) for node in nodes}
    known = {node: (sae, latent) for node, (sae, latent) in places.items() if sae is not None and latent < sae.width}
    captions = index.captions(known.values())
    return {node: captions[sae.number, latent] for node, (sae, latent) in known.items() if (sae.number, latent) in captions}


def circuit_data(index: Index, links: Links, name: str, path: Path) -> dict[str, Any]:
    """Nodes and edges for the script. `cum` is the share of influence that a node or edge and all stronger ones have."""
    whole = read_graph(path)
    rank = cumulative(whole.influence)
    kept = whole.pruned(NODE_SHARE, EDGE_SHARE)
    places = {key: node for node, key in enumerate(_keys(whole))}
    captions = labels_in(index, kept)
    nodes = []
    for node, key in enumerate(_keys(kept)):
        before = places[key]
        found: dict[str, Any] = {
            "id": "_".join(map(str, key)),
            "kind": KINDS[key[0]],
            "layer": key[1],
            "position": key[2],
            "index": key[3],
            "influence": float(whole.influence[before] / max(whole.start.sum(), 1e-300)),
            "cum": float(rank[before]),
            "activation": float(kept.activation[node]),
            "pre": float(kept.pre[node]),
            "bias": float(kept.bias[node]),
            "rest": float(kept.rest[node]),
            "weight": float(kept.start[node]),
            "fixed": bool(kept.is_fixed[node]),
        }
        if key[0] == LATENT:
            coder = kept.facts.coders[int(kept.coder[node])].name
            is_known = index.find(coder) is not None
            caption = captions.get(node, {"label": None, "top": []})
            found["label"] = caption["label"] or " ".join(piece.plain for piece in caption["top"][:3])
            found["href"] = links.latent(coder, key[3]) if is_known else None
            found["raw"] = links.raw(coder, key[3]) if is_known else None
        nodes.append(found)
    for place, target in zip(np.flatnonzero(kept.kind == LOGIT), kept.facts.targets, strict=True):
        nodes[place] |= {"label": shown(target.text), "probability": target.probability}
    return {
        "tokens": [shown(token) for token in kept.facts.tokens],
        "layers": kept.facts.num_layers,
        "nodes": nodes,
        "edges": _edges(kept),
        "method": kept.facts.method,
        "name": name,
    }


def _keys(graph: Graph) -> list[tuple[int, int, int, int]]:
    columns = (graph.kind, graph.layer, graph.position, graph.index)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _edges(graph: Graph) -> list[list[float]]:
    """Source, target, weight and cumulative share, the strongest first."""
    worth = graph.edges.shares(len(graph)) * (graph.influence + graph.start)[graph.edges.target]
    share, order = cumulative(worth), np.argsort(-worth, kind="stable")[:MAX_EDGES]
    columns = (graph.edges.source, graph.edges.target, graph.edges.weight, share)
    return [list(row) for row in zip(*(column[order].tolist() for column in columns), strict=True)]


def circuit_foreign(index: Index, name: str, path: Path) -> dict[str, Any]:
    """The graph, pruned as circuit-tracer prunes, in its form and with the suite's labels."""
    graph = read_graph(path).pruned(FOREIGN_NODE_SHARE)
    labels = {
        (int(graph.coder[node]), int(graph.index[node])): caption["label"]
        for node, caption in labels_in(index, graph).items()
        if caption["label"]
    }
    return to_json(graph, name, labels, index.suite["title"], FOREIGN_NODE_SHARE)
