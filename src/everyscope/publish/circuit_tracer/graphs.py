"""Labels on the nodes of circuit-tracer's graph files, which it writes without any. Torch-free."""

import re
from collections.abc import Mapping
from pathlib import Path

from everyscope.base.errors import DataError
from everyscope.base.files import read_object, write_json

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
