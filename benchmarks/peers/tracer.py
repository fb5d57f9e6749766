"""circuit-tracer on a set that we wrote: a process in its own environment that prints one JSON line.

It loads the folder by its own loader, encodes and decodes given activations, runs the language model with its own hooks, and
attributes a prompt. Through the nnsight backend, which loads any folder of a Hugging Face model.
"""

# pyright: reportMissingImports=false
# The package is in an environment of its own (peers/launch.py).

import gzip
import json
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.frontend import feature_models
from circuit_tracer.utils import create_graph_files


def main(request: dict[str, Any]) -> None:
    """The request: {"set", "model", "arrays": x, f, y, f_of_prompt and input_ids, "graphs", "slug"}."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model: Any = ReplacementModel.from_pretrained(
        request["model"], request["set"], backend="nnsight", device=device, dtype=torch.float32
    )
    arrays = np.load(request["arrays"])
    x, transcoders = torch.from_numpy(arrays["x"]), model.transcoders
    with torch.no_grad():
        f = transcoders.encode(x)
        y = transcoders.decode(f, x)
        tokens = torch.from_numpy(arrays["input_ids"])
        # Its own hooks on its own run of the model; position 0, BOS, it sets to zero by rule.
        _, own = model.get_activations(tokens)
    graph = attribute(tokens, model, max_n_logits=5, max_feature_nodes=300, batch_size=64, verbose=False)
    create_graph_files(graph, request["slug"], request["graphs"], node_threshold=0.9, edge_threshold=0.98)
    weights = graph.adjacency_matrix
    print(
        json.dumps(
            {
                "versions": {name: version(name) for name in ("circuit-tracer", "nnsight", "transformers", "torch")},
                "layers": len(transcoders),
                "has_skip": bool(transcoders.skip_connection),
                "latents": _difference(f, arrays["f"]),
                "outputs": _difference(y, arrays["y"]),
                "latents_through_its_hooks": _difference(own[:, 1:], arrays["f_of_prompt"][:, 1:]),
                "active": int((own[:, 1:] > 0).sum()),
                "features": _features(Path(request["set"]) / "features"),
                "graph": {
                    "nodes": len(weights),
                    "latents": len(graph.selected_features),
                    "edges": int((weights != 0).sum()),
                    "is_finite": bool(torch.isfinite(weights).all()),
                    "file": str(Path(request["graphs"]) / f"{request['slug']}.json"),
                },
            }
        )
    )


def _features(folder: Path) -> dict[str, int]:
    """How many latents of each layer's feature file are what its viewer's own model of them says; no files, no layers."""
    if not folder.is_dir():
        return {}
    index, counts = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes())), {}
    for layer, entry in index.items():
        data, offsets = (folder / entry["filename"]).read_bytes(), entry["offsets"]
        for begin, end in pairwise(offsets):
            length = int.from_bytes(data[begin : begin + 4], "little")  # as its viewer reads it
            assert begin + 4 + length == end, f"layer {layer}: {end - begin} bytes at {begin}, of which {length} are a latent's"
            feature_models.Model.model_validate_json(gzip.decompress(data[begin + 4 : end]))
        counts[layer] = len(offsets) - 1
    return counts


def _difference(theirs: torch.Tensor, ours: np.ndarray) -> float:
    """The largest difference, relative to the largest of ours."""
    return float(np.abs(theirs.float().numpy().reshape(ours.shape) - ours).max() / np.abs(ours).max())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
