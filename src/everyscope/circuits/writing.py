"""Writing graphs; reading them needs no torch, and is in `files`."""

from pathlib import Path

import torch

from everyscope.base.tensors import write_tensors
from everyscope.circuits.files import FORMAT, WHOLE
from everyscope.circuits.graph import COLUMNS, Graph


def write_graph(path: Path, graph: Graph) -> None:
    """Write a sealed file, whole or not at all; equal graphs give equal bytes."""
    tensors = {name: torch.from_numpy(getattr(graph, name)) for name in COLUMNS}
    tensors = {name: tensor.to(torch.int32 if name in WHOLE else torch.float32) for name, tensor in tensors.items()}
    tensors["source"], tensors["target"] = (torch.from_numpy(ends).int() for ends in (graph.edges.source, graph.edges.target))
    tensors["weight"] = torch.from_numpy(graph.edges.weight).float()
    write_tensors(path, tensors, {"format_of_graph": FORMAT, "facts": graph.facts.model_dump_json()}, is_sealed=True)
