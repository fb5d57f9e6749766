"""Attribution graphs as pages: a list of them, and one with everything that its script draws."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from everyscope.base.errors import DataError
from everyscope.browse.links import Links
from everyscope.browse.pieces import Piece, runs
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.views.examples import AFTER, BEFORE, level
from everyscope.circuits.choosing import own_labels
from everyscope.circuits.circuit_tracer import node_id, to_json
from everyscope.circuits.files import read_facts
from everyscope.circuits.graph import KINDS, LARGEST_VIOLATION, LATENT, LOGIT, TOKEN, Graph
from everyscope.circuits.influence import cumulative
from everyscope.circuits.paths import strongest_paths

NODE_SHARE, EDGE_SHARE = 0.98, 0.995
"""Of the influence, what the page gets of nodes and edges; its sliders take away from that [1]."""
MAX_EDGES = 12_000
"""Edges that a page gets, the strongest [edges]."""
LISTED = 300
"""Graphs in a list, the first by name [graphs]."""
FOREIGN_NODE_SHARE, FOREIGN_EDGE_SHARE = 0.8, 0.98
"""As circuit-tracer prunes [1]."""
SUGGESTED, PATHS = {LATENT: 7, TOKEN: 4}, 200
"""Latents and tokens that are boxes until something is pinned, and paths that are looked at for them [nodes, paths]."""
CARD_LISTS = {"fires": "tokens", "raises": "top_logits", "lowers": "bottom_logits"}
CARD_TOKENS, CARD_EXAMPLES = 6, 3
"""On a latent's card [tokens of each list, examples]."""
SITE_WORDS = {"attn_out": "attn", "mlp_out": "mlp", "resid_post": "resid"}


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


def circuit_view(links: Links, name: str, graph: Graph, inline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the page says around the drawing. `inline` is the script's data where the page has no server."""
    return {
        "graph": graph,
        "facts": graph.facts,
        "targets": [(shown(target.text), target.probability) for target in graph.facts.targets],
        "is_exact": is_exact(graph.largest_violation),
        "num_latents": int((graph.kind == LATENT).sum()),
        "data": links.circuit(name, ".json"),
        "file": links.circuit(name, "/page.html"),
        "foreign": links.circuit(name, "/circuit-tracer.json"),
        "inline": None if inline is None else script_json(inline),
    }


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element around it."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def shown(text: str) -> str:
    """A token in which nothing is invisible."""
    return Piece(0, text.encode("utf-8", "surrogatepass"), False).plain


def captions_in(index: Index, graph: Graph) -> dict[int, dict[str, Any]]:
    """What the suite calls the latents of a graph, by node: `label`, or None, and the tokens it fires most on."""
    nodes = np.flatnonzero(graph.kind == LATENT).tolist()
    places = {node: (index.find(graph.facts.coders[int(graph.coder[node])].name), int(graph.index[node])) for node in nodes}
    known = {node: (sae, latent) for node, (sae, latent) in places.items() if sae is not None and latent < sae.width}
    captions = index.captions(known.values())
    return {node: captions[sae.number, latent] for node, (sae, latent) in known.items() if (sae.number, latent) in captions}


def labels_in(index: Index, graph: Graph) -> dict[tuple[int, int], str]:
    """Labels of a graph's latents by coder and latent: the suite's, or its own."""
    of_suite = {
        (int(graph.coder[node]), int(graph.index[node])): caption["label"]
        for node, caption in captions_in(index, graph).items()
        if caption["label"]
    }
    return own_labels(graph) | of_suite


def circuit_data(index: Index, links: Links, name: str, whole: Graph, *, can_ablate: bool = False) -> dict[str, Any]:
    """Nodes and edges for the script. `cum` is the share of influence that a node or edge and all stronger ones have."""
    kept = whole.pruned(NODE_SHARE, EDGE_SHARE, pinned_in(whole, whole.facts.pins))
    ids = [node_id(kept, node) for node in range(len(kept))]
    facts, number = kept.facts, {one: node for node, one in enumerate(ids)}
    names = [SITE_WORDS.get(coder.kind, coder.kind) for coder in facts.coders]
    parts = list(SITE_WORDS.values()) if kept.is_stacked else [""]
    rows = [f"layer {layer} {part}".strip() for layer in range(facts.num_layers) for part in parts]
    return {
        "tokens": [shown(token) for token in facts.tokens],
        "rows": rows,
        "nodes": _nodes(index, links, whole, kept, ids, names if kept.is_stacked else [""] * len(names)),
        "edges": _edges(kept),
        "targets": [ids[node] for node in np.flatnonzero(kept.kind == LOGIT)],
        "method": facts.method,
        "name": name,
        "pins": [pin for pin in facts.pins if pin in number],
        "groups": [list(group) for group in facts.groups],
        "suggested": [ids[node] for node in suggested(kept)],
        "card": links.circuit(name, "/card"),
        "ablate": links.circuit(name, "/ablate") if can_ablate and facts.method == "replacement" else None,
        "foreign": links.circuit(name, "/circuit-tracer.json"),
        "cards": None,
    }


def pinned_in(graph: Graph, pins: Any) -> np.ndarray:
    """Which nodes are pinned; names that the graph does not have are passed over."""
    wanted = set(pins)
    return np.array([bool(wanted) and node_id(graph, node) in wanted for node in range(len(graph))], bool)


def suggested(graph: Graph) -> list[int]:
    """The latents and tokens of the strongest paths, the strongest first; errors say nothing that a person can read."""
    found: dict[int, list[int]] = {kind: [] for kind in SUGGESTED}
    for node in (node for path in strongest_paths(graph, PATHS) for node in path.nodes):
        some = found.get(int(graph.kind[node]))
        if some is not None and graph.start[node] == 0 and node not in some:
            some.append(node)
    return [node for kind, some in found.items() for node in some[: SUGGESTED[kind]]]


def _nodes(index: Index, links: Links, whole: Graph, kept: Graph, ids: list[str], sites: list[str]) -> list[dict[str, Any]]:
    rank, places = cumulative(whole.influence), {key: node for node, key in enumerate(_keys(whole))}
    captions, own, total = captions_in(index, kept), own_labels(kept), max(whole.start.sum(), 1e-300)
    nodes = []
    for node, key in enumerate(_keys(kept)):
        before, coder = places[key], int(kept.coder[node])
        found: dict[str, Any] = {
            "id": ids[node],
            "kind": KINDS[key[0]],
            "layer": key[1],
            "position": key[2],
            "index": key[3],
            "coder": coder,
            "row": int(kept.row[node]),
            "level": int(kept.level[node]),
            "site": sites[coder] if coder >= 0 else "",
            "influence": float(whole.influence[before] / total),
            "cum": float(rank[before]),
            "activation": float(kept.activation[node]),
            "pre": float(kept.pre[node]),
            "bias": float(kept.bias[node]),
            "rest": float(kept.rest[node]),
            "weight": float(kept.start[node]),
            "fixed": bool(kept.is_fixed[node]),
        }
        if key[0] == LATENT:
            folder = kept.facts.coders[coder].name
            caption = captions.get(node, {"label": None, "top": []})
            label = caption["label"] or own.get((coder, key[3]))
            found["label"] = label or " ".join(piece.plain for piece in caption["top"][:3])
            found["href"] = links.latent(folder, key[3]) if index.find(folder) is not None else None
        nodes.append(found)
    for place, target in zip(np.flatnonzero(kept.kind == LOGIT), kept.facts.targets, strict=True):
        nodes[place] |= {"label": shown(target.text), "probability": target.probability}
    return nodes


def _keys(graph: Graph) -> list[tuple[int, ...]]:
    columns = (graph.kind, graph.layer, graph.position, graph.index, graph.coder)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _edges(graph: Graph) -> list[list[float]]:
    """Source, target, weight and cumulative share, the strongest first."""
    worth = graph.edges.shares(len(graph)) * (graph.influence + graph.start)[graph.edges.target]
    share, order = cumulative(worth), np.argsort(-worth, kind="stable")[:MAX_EDGES]
    columns = (graph.edges.source, graph.edges.target, graph.edges.weight, share)
    return [list(row) for row in zip(*(column[order].tolist() for column in columns), strict=True)]


def circuit_foreign(index: Index, name: str, graph: Graph, node_share: float, edge_share: float) -> dict[str, Any]:
    """The graph, pruned but for what is pinned, in circuit-tracer's form and with the suite's labels."""
    pruned = graph.pruned(node_share, edge_share, pinned_in(graph, graph.facts.pins))
    return to_json(pruned, name, labels_in(index, pruned), index.suite["title"], node_share)


def card_of(index: Index, sae: SaeFacts | None, latent: int) -> dict[str, Any] | None:
    """What a latent fires on, writes for and against, and its strongest examples; None for a latent that the suite lacks."""
    columns = [*CARD_LISTS.values(), "examples", "max_activation"]
    details = None if sae is None else index.details(sae, latent, columns)
    if details is None:
        return None
    lists = {name: (details.get(column) or [])[:CARD_TOKENS] for name, column in CARD_LISTS.items()}
    pieces = index.pieces(item["token"] for items in lists.values() for item in items)
    card: dict[str, Any] = {name: [pieces[item["token"]].plain for item in items] for name, items in lists.items()}
    return {**card, "examples": _examples(index, details)}


def _examples(index: Index, details: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """Stretches of text and how strongly the latent fires on each, 0 to 10."""
    examples = [one for one in details.get("examples") or [] if one.get("activations")][:CARD_EXAMPLES]
    blocks = index.sequences(one["sequence"] for one in examples)
    found = []
    for one in (example for example in examples if example["sequence"] in blocks):
        ids, start = blocks[one["sequence"]][2], one["start"]
        first, last = max(0, one["position"] - BEFORE), min(len(ids), one["position"] + AFTER + 1)
        pieces, parts = index.pieces(ids[first:last].tolist()), list[tuple[str, int]]()
        for place, token in enumerate(ids[first:last].tolist(), first):
            value = one["activations"][place - start] if 0 <= place - start < len(one["activations"]) else 0.0
            text = "".join(part for _, part in runs(pieces[token].raw, dots_from=2))
            parts.append((text, level(value or 0.0, details.get("max_activation") or 1.0)))
        found.append(parts)
    return found
