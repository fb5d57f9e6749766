"""circuit-tracer's attribution graph of a prompt through a set that we wrote, as arrays; a process in its own environment."""

# pyright: reportMissingImports=false
# The package is in an environment of its own (peers/launch.py).

import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph


def main(request: dict[str, Any]) -> None:
    """The request: {"set", "model", "input_ids", "out"}."""
    torch.set_num_threads(1)
    model: Any = ReplacementModel.from_pretrained(
        request["model"], request["set"], backend="nnsight", device=torch.device("cpu"), dtype=torch.float32
    )
    tokens = torch.tensor(request["input_ids"])
    graph = attribute(tokens, model, max_n_logits=10, desired_logit_prob=0.95, batch_size=64, verbose=False)
    pruned = prune_graph(graph)
    np.savez(
        request["out"],
        active=graph.active_features.numpy(),
        selected=graph.selected_features.numpy(),
        activation=graph.activation_values.numpy(),
        adjacency=graph.adjacency_matrix.numpy(),
        logits=np.array([target.vocab_idx for target in graph.logit_targets]),
        probabilities=graph.logit_probabilities.numpy(),
        kept=pruned.node_mask.numpy(),
    )
    replacement, completeness = compute_graph_scores(graph)
    print(json.dumps({"version": version("circuit-tracer"), "replacement": replacement, "completeness": completeness}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
