"""Our attribution graph beside circuit-tracer's: same model, same transcoders, same prompt; nodes, edges and scores.

    python benchmarks/circuits.py [--out benchmarks/results/circuits.json]

The models are tiny (Gemma 2) and a random Llama, the transcoders random directions with least-squares decoders.
Two things differ by rule, both at position 0 (BOS), where no transcoder is trained. circuit-tracer drops its errors, where we
keep what MLPs add: these are taken out before comparing. And a skip works there too, where for us all is error: with skips, edges
from position 0 are compared apart. It also lists latents that reach no target, which we leave out.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from interchange import Activations, answer, captured, small_llama, transcoder, without_gain
from peers.launch import python_of

from everyscope.base.bundled import model_location
from everyscope.base.files import write_json
from everyscope.circuits.attribution import attribute
from everyscope.circuits.config import AttributionConfig
from everyscope.circuits.graph import ERROR, LATENT, LOGIT, TOKEN, Graph
from everyscope.sae.folded import Sae
from everyscope.suite.formats import circuit_tracer

TOLERANCE = 1e-3
"""The largest difference that counts as agreement: of an edge relative to the largest edge, of a score absolute [1]."""


def main() -> None:
    """Ask both, for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--out", type=Path, default=None, help="results.json; printed only, if not given")
    options = parser.parse_args()
    found: dict[str, Any] = {"command": "python benchmarks/circuits.py", "tolerance": TOLERANCE}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        llama, gemma = captured(small_llama(work / "llama")), captured(model_location("tiny"))
        sets = {
            "llama_skip": (llama, [transcoder(llama, layer, True) for layer in range(llama.num_layers)]),
            "gemma_2": (gemma, [without_gain(gemma.model, transcoder(gemma, layer, False)) for layer in range(gemma.num_layers)]),
        }
        for name, (of, coders) in sets.items():
            found[name] = compare(name, of, coders, work, options.cache)
    print(json.dumps(found, indent=2))
    if options.out:
        write_json(options.out, found)
    if not all(found[name]["agrees"] for name in sets):
        raise SystemExit(f"they do not agree to {TOLERANCE}")


def compare(name: str, of: Activations, coders: list[Sae], work: Path, cache: Path) -> dict[str, Any]:
    """Both graphs of one prompt."""
    folder, path = work / name, work / f"{name}.npz"
    circuit_tracer.write(folder, coders, model=of.location, output="hook_mlp_out", scan=str(folder.resolve()))
    ids = of.input_ids.tolist()
    request = {"set": str(folder.resolve()), "model": of.location, "input_ids": ids, "out": str(path)}
    theirs = answer(python_of("circuit_tracer", cache), "circuits", request)
    arrays = np.load(path)
    most = AttributionConfig(max_latents=10**6, edges_per_node=10**6)
    graph = attribute(of.model, coders, of.input_ids, config=most)
    ours = without_errors_at_bos(graph)
    names = places_of(arrays, ours, of.num_layers, len(ids))
    own = {key: node for node, key in enumerate(keys_of(ours))}
    shared = [key for key in names if key in own]
    dense = np.zeros((len(ours), len(ours)))
    dense[ours.edges.target, ours.edges.source] = ours.edges.weight
    mine, yours = (matrix[np.ix_(at, at)] for matrix, at in (
        (dense, [own[key] for key in shared]), (arrays["adjacency"], [names[key] for key in shared])
    ))  # fmt: skip
    at_bos = np.array([key[2] == 0 for key in shared])
    difference = np.abs(mine - yours) / np.abs(yours).max()
    edges, from_bos = float(difference[:, ~at_bos].max()), float(difference[:, at_bos].max())
    unreached = [names[key] for key in names if key not in own]
    reach = float(np.abs(arrays["adjacency"][np.ix_([names[key] for key in shared], unreached)]).max(initial=0.0))
    has_skip = coders[0].W_skip is not None
    scores = {"replacement": ours.scores.replacement, "completeness": ours.scores.completeness}
    apart = max(abs(scores[score] - theirs[score]) for score in scores)
    only = {"only_ours": len([key for key in own if key not in names]), "only_theirs": len(unreached)}
    kept = {key for key, node in names.items() if arrays["kept"][node]}
    left = ours.pruned()
    return {
        "circuit_tracer": theirs,
        "ours": scores,
        "nodes": len(shared),
        **only,
        "edges_of_nodes_that_only_they_have": reach,
        "largest_difference_of_edges": edges,
        "the_same_from_position_0": from_bos,
        "largest_difference_of_scores": apart,
        "pruned_nodes": {"ours": len(left), "theirs": len(kept), "shared": len(kept & set(keys_of(left)))},
        "violation": graph.largest_violation,
        "agrees": max(edges, apart, reach, 0.0 if has_skip else from_bos) <= TOLERANCE and not only["only_ours"],
    }


def keys_of(graph: Graph) -> list[tuple[int, int, int, int]]:
    """Kind, layer, position and index of each node."""
    columns = (graph.kind, graph.layer, graph.position, graph.index)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def places_of(arrays: Any, graph: Graph, layers: int, context: int) -> dict[tuple[int, int, int, int], int]:
    """circuit-tracer's nodes by our keys: selected latents, errors by layer and position, tokens, logits."""
    latents = arrays["active"][arrays["selected"]].tolist()
    keys = [(LATENT, layer, position, latent) for layer, position, latent in latents]
    keys += [(ERROR, layer, position, -1) for layer in range(layers) for position in range(context)]
    keys += [(TOKEN, -1, position, token) for position, token in enumerate(graph.facts.token_ids)]
    keys += [(LOGIT, layers, context - 1, int(token)) for token in arrays["logits"]]
    return {key: node for node, key in enumerate(keys)}


def without_errors_at_bos(graph: Graph) -> Graph:
    """The graph whose errors at position 0 send nothing."""
    is_out = (graph.kind == ERROR) & (graph.position == 0)
    return replace(graph, edges=graph.edges.where(~is_out[graph.edges.source]))


if __name__ == "__main__":
    main()
