"""Graphs as circuit-tracer's JSON (schema version 1), which its viewer and Neuronpedia's open. Torch-free.

One thing differs on purpose: circuit-tracer names the error of layer L at position P `0_L_P`, which is also the name of latent L
of layer 0 there; we write `error_L_P`, and read both. Where a layer has several SAEs, each counts as a layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from everyscope.base.errors import DataError
from everyscope.circuits.files import require_sound
from everyscope.circuits.graph import ERROR, LATENT, LOGIT, TOKEN, CoderFacts, Graph, GraphFacts, TargetFacts
from everyscope.circuits.influence import Edges, cumulative

TYPES = {LATENT: "cross layer transcoder", ERROR: "mlp reconstruction error", TOKEN: "embedding", LOGIT: "logit"}
Labels = Mapping[tuple[int, int], str]
"""By coder and latent."""


def paired(layer: int, latent: int) -> int:
    """Cantor's number of the pair, which circuit-tracer calls a feature."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def unpaired(number: int) -> tuple[int, int]:
    """Layer and latent of such a number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    latent = number - diagonal * (diagonal + 1) // 2
    return diagonal - latent, latent


def to_json(graph: Graph, slug: str, labels: Labels, scan: str, node_share: float | None = None) -> dict[str, Any]:
    """The graph, as it is, in circuit-tracer's form; prune it first. `scan` names the set of transcoders."""
    pins, groups = list(graph.facts.pins), [list(group) for group in graph.facts.groups]
    ids = [node_id(graph, node) for node in range(len(graph))]
    share = cumulative(graph.influence)
    edges = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), graph.edges.weight.tolist(), strict=True)
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [coder.name for coder in graph.facts.coders],
            "prompt_tokens": list(graph.facts.tokens),
            "prompt": graph.facts.prompt,
            "node_threshold": node_share,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": pins, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, node, ids[node], float(share[node]), labels) for node in range(len(graph))],
        "links": [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in edges],
    }


def node_id(graph: Graph, node: int) -> str:
    """What a node is called in such a file; pages call it the same."""
    layer, index, position = (int(getattr(graph, name)[node]) for name in ("row", "index", "position"))
    match int(graph.kind[node]):
        case 0:
            return f"{layer}_{index}_{position}"
        case 1:
            return f"error_{layer}_{position}"
        case 2:
            return f"E_{index}_{position}"
        case _:
            return f"{layer + 1}_{index}_{position}"


def _node(graph: Graph, node: int, node_id: str, share: float, labels: Labels) -> dict[str, Any]:
    kind, layer, index, position = (int(getattr(graph, name)[node]) for name in ("kind", "row", "index", "position"))
    shown = {LATENT: str(layer), ERROR: str(layer), TOKEN: "E", LOGIT: str(layer + 1)}[kind]
    js = {
        LATENT: f"{layer}_{index}-0",
        ERROR: f"{layer}_{position}-0",
        TOKEN: f"E_{index}-{position}",
        LOGIT: f"L_{index}-{position}",
    }
    found: dict[str, Any] = {
        "node_id": node_id,
        "feature": {LATENT: paired(layer, index), ERROR: -1, TOKEN: position, LOGIT: index}[kind],
        "layer": shown,
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js[kind],
        "clerp": labels.get((int(graph.coder[node]), index), "") if kind == LATENT else "",
        "influence": None if kind == LOGIT else share,
        "activation": float(graph.activation[node]) if kind == LATENT else None,
    }
    if kind == LOGIT:
        first = len(graph) - len(graph.facts.targets)
        target = graph.facts.targets[node - first]
        clerp = f'Output "{target.text}" (p={target.probability:.3f})'
        found |= {"token_prob": target.probability, "is_target_logit": node == first, "clerp": clerp}
    return found


def from_json(value: Any, name: str) -> Graph:
    """The graph of circuit-tracer's JSON, its labels, pins and groups among its facts; DataError, which calls it `name`, for
    anything else.

    Such a file holds no biases and not what was pruned: of each node `rest`, `bias` and `violation` are 0.
    """
    try:
        graph = _read(value)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__} {error}"
        raise DataError(f"{name}: is no graph of circuit-tracer's schema 1 ({what[:120]}); export it again") from error
    require_sound(graph, name)
    return graph


def _read(value: Any) -> Graph:
    kinds = {text: kind for kind, text in TYPES.items()}
    nodes = sorted(value["nodes"], key=lambda node: kinds[node["feature_type"]])
    tokens = [str(token) for token in value["metadata"]["prompt_tokens"]]
    num_layers = max(int(node["layer"]) for node in nodes if kinds[node["feature_type"]] == LOGIT) - 1
    columns: dict[str, list[float]] = {name: [] for name in ("kind", "layer", "position", "index", "activation", "start")}
    labels, ids, token_ids = dict[str, str](), dict[str, int](), [0] * len(tokens)
    for place, node in enumerate(nodes):
        ids.setdefault(node["node_id"], place)  # of an error and a latent with one name the latent has it
        kind, position = kinds[node["feature_type"]], int(node["ctx_idx"])
        layer, index = _place(node, kind, num_layers)
        for column, entry in zip(columns.values(), (kind, layer, position, index), strict=False):
            column.append(entry)
        columns["activation"].append(float(node.get("activation") or 0.0))
        columns["start"].append(float(node["token_prob"]) if kind == LOGIT else 0.0)
        if kind == LATENT and node.get("clerp"):
            labels[f"{layer}_{index}"] = str(node["clerp"])
        if kind == TOKEN:
            token_ids[position] = index
    links = [(ids[link["source"]], ids[link["target"]], float(link["weight"])) for link in value["links"]]
    arrays = {
        name: np.array(column, np.float64 if name in ("activation", "start") else np.int64) for name, column in columns.items()
    }
    widths = [2 + int(arrays["index"][arrays["layer"] == layer].max(initial=0)) for layer in range(num_layers)]
    facts = GraphFacts(
        prompt=str(value["metadata"]["prompt"]),
        tokens=tuple(tokens),
        token_ids=tuple(token_ids),
        model=str(value["metadata"]["scan"]),
        num_layers=num_layers,
        method="imported",
        coders=tuple(CoderFacts(layer=layer, name=f"layer {layer}", width=widths[layer]) for layer in range(num_layers)),
        targets=tuple(_target(node) for node in nodes if kinds[node["feature_type"]] == LOGIT),
        num_active=int((arrays["kind"] == LATENT).sum()),
        logit_error=0.0,
        title=str(value["metadata"]["slug"]),
        labels=labels,
        **_pinned(value.get("qParams") or {}, {str(one["node_id"]): _own_id(one) for one in nodes}),
    )
    nothing = np.zeros(len(nodes))
    coder = np.where(np.isin(arrays["kind"], (LATENT, ERROR)), arrays["layer"], -1)
    source, target, weight = (np.array(ends) for ends in zip(*links, strict=True)) if links else (np.zeros(0),) * 3
    blank = dict.fromkeys(("pre", "bias", "rest", "rest_size", "violation"), nothing)
    edges = Edges(source.astype(np.int64), target.astype(np.int64), weight.astype(np.float64))
    return Graph(facts, **arrays, coder=coder, **blank, edges=edges)


def _own_id(node: dict[str, Any]) -> str:
    """Their name of a node, but for errors."""
    is_error = node["feature_type"] == TYPES[ERROR]
    return f"error_{int(node['layer'])}_{int(node['ctx_idx'])}" if is_error else str(node["node_id"])


def _pinned(params: dict[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """What its viewer had pinned and grouped, of nodes that are there."""
    groups = [
        (str(name), *(known[str(one)] for one in some if str(one) in known)) for name, *some in params.get("supernodes") or []
    ]
    pins = tuple(known[str(one)] for one in params.get("pinnedIds") or [] if str(one) in known)
    return {"pins": pins, "groups": tuple(group for group in groups if len(group) > 1)}


def _place(node: dict[str, Any], kind: int, num_layers: int) -> tuple[int, int]:
    """Layer and index of a node."""
    match kind:
        case 0:
            return unpaired(int(node["feature"]))
        case 1:
            return int(node["layer"]), -1
        case 2:
            return -1, int(node["node_id"].split("_")[1])
        case _:
            return num_layers, int(node["feature"])


def _target(node: dict[str, Any]) -> TargetFacts:
    text = str(node.get("clerp") or f"#{node['feature']}")
    start, stop = text.find('"'), text.rfind('"')
    text = text[start + 1 : stop] if 0 <= start < stop else text
    return TargetFacts(token=int(node["feature"]), text=text, probability=float(node["token_prob"]))
