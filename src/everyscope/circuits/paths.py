"""The strongest paths through a graph, from its targets back to the prompt. Torch-free."""

import heapq
from dataclasses import dataclass

import numpy as np

from everyscope.circuits.graph import Graph

MAX_STEPS = 50_000
"""Nodes that are visited at most: the strongest paths come first, and are found long before [steps]."""


@dataclass(frozen=True)
class Path:
    """Nodes from a source that receives nothing to a target."""

    nodes: tuple[int, ...]
    share: float
    """Of all influence on the targets, what runs along this path [1]."""
    sign: int
    """Whether it raises (1) or lowers (-1) the target."""


def strongest_paths(graph: Graph, count: int) -> list[Path]:
    """The `count` paths with the largest products of shares, best first; several may differ in one step only."""
    order = np.argsort(graph.edges.target, kind="stable")
    edges = graph.edges.where(order)
    shares = edges.shares(len(graph))
    bounds = np.searchsorted(edges.target, np.arange(len(graph) + 1))
    total = graph.start.sum()
    waiting: list[tuple[float, int, tuple[int, ...], int]] = [
        (-weight / total, number, (int(node),), 1) for number, (node, weight) in enumerate(_targets(graph))
    ]
    heapq.heapify(waiting)
    found: list[Path] = []
    number = len(waiting)
    while waiting and len(found) < count and number < MAX_STEPS:
        share, _, nodes, sign = heapq.heappop(waiting)
        begin, end = bounds[nodes[0]], bounds[nodes[0] + 1]
        if begin == end:
            found.append(Path(nodes, -share, sign))
        for edge in range(begin, end):
            number += 1
            step = (share * shares[edge], number, (int(edges.source[edge]), *nodes), sign * int(np.sign(edges.weight[edge])))
            heapq.heappush(waiting, step)
    return found


def _targets(graph: Graph) -> list[tuple[int, float]]:
    nodes = np.flatnonzero(graph.start > 0)
    return list(zip(nodes.tolist(), graph.start[nodes].tolist(), strict=True))
