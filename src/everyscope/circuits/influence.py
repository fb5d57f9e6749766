"""How much of a target each node accounts for, through all paths; which nodes and edges to keep; the scores of a graph.

Shares: of the sizes of all that a node receives, what one edge brings. A node's influence is the sum over all paths to the
targets of the product of shares, weighted by the targets. Edges lead to higher levels only, so one walk from the highest level
down finds all paths: no power of a matrix, and no matrix of nodes by nodes. Formulas: Ameisen et al. 2025, as circuit-tracer 0.5
computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

Weights = Float[ndarray, " nodes"]


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges from nodes to nodes, by number."""

    source: Int[ndarray, " edges"]
    target: Int[ndarray, " edges"]
    weight: Float[ndarray, " edges"]

    def where(self, kept: Bool[ndarray, " edges"]) -> "Edges":
        """Some of them."""
        return Edges(self.source[kept], self.target[kept], self.weight[kept])

    def shares(self, num_nodes: int) -> Float[ndarray, " edges"]:
        """Of each edge, |weight| over the sum of |weight| of all edges to its target [1]."""
        size = np.abs(self.weight).astype(np.float64)
        total = np.bincount(self.target, size, num_nodes)
        return size / np.maximum(total, np.finfo(np.float64).tiny)[self.target]


def influence(edges: Edges, shares: Float[ndarray, " edges"], level: Int[ndarray, " nodes"], start: Weights) -> Weights:
    """Of each node, the weight of `start` that paths of one edge or more bring it: start (A + A^2 + ...)."""
    found = np.zeros(len(start))
    for source, target, share in _by_level(edges, shares, level):
        found += np.bincount(source, share * (found + start)[target], len(start))
    return found


def _by_level(
    edges: Edges, shares: Float[ndarray, " edges"], level: Int[ndarray, " nodes"]
) -> Sequence[tuple[ndarray, ndarray, ndarray]]:
    """The edges in groups by their target's level, the highest first."""
    levels = level[edges.target]
    order = np.argsort(-levels, kind="stable")
    bounds = np.flatnonzero(np.diff(levels[order])) + 1
    parts = (np.split(values[order], bounds) for values in (edges.source, edges.target, shares))
    return list(zip(*parts, strict=True))


@dataclass(frozen=True)
class Scores:
    """How much of a graph runs through latents and not through errors."""

    replacement: float
    """Influence of tokens over that of tokens and errors: what paths that end in the prompt bring [1]."""
    completeness: float
    """Share of what nodes receive that does not come from errors, nodes weighted by their influence [1]."""


def scores(
    edges: Edges,
    level: Int[ndarray, " nodes"],
    start: Weights,
    is_token: Bool[ndarray, " nodes"],
    is_error: Bool[ndarray, " nodes"],
) -> Scores:
    """Of a whole graph, before it is pruned. Without any influence both are 0."""
    shares = edges.shares(len(start))
    found = influence(edges, shares, level, start)
    tokens, errors = found[is_token].sum(), found[is_error].sum()
    from_errors = np.bincount(edges.target, shares * is_error[edges.source], len(start))
    weight = found + start
    total = max(weight.sum(), np.finfo(np.float64).tiny)
    return Scores(
        float(tokens / max(tokens + errors, np.finfo(np.float64).tiny)), float(((1 - from_errors) * weight).sum() / total)
    )


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is left of a graph."""

    nodes: Bool[ndarray, " nodes"]
    edges: Bool[ndarray, " edges"]


def prune(
    edges: Edges,
    level: Int[ndarray, " nodes"],
    start: Weights,
    is_kept: Bool[ndarray, " nodes"],
    is_latent: Bool[ndarray, " nodes"],
    node_share: float,
    edge_share: float,
) -> Pruned:
    """The nodes that together have `node_share` of all influence, and of the edges between them those with `edge_share`.

    `is_kept` nodes, tokens and targets, stay in any case. Then nodes fall, again and again, that lead nowhere, and latents that
    receive nothing.
    """
    found = influence(edges, edges.shares(len(start)), level, start)
    nodes = (found >= threshold_of(found, node_share)) | is_kept
    inside = np.flatnonzero(nodes[edges.source] & nodes[edges.target])
    among = edges.where(inside)
    shares = among.shares(len(start))
    worth = shares * (influence(among, shares, level, start) + start)[among.target]
    kept = np.zeros(len(edges.source), bool)
    kept[inside] = worth >= threshold_of(worth, edge_share)
    while True:
        leads = np.bincount(edges.source[kept], minlength=len(start)) > 0
        receives = np.bincount(edges.target[kept], minlength=len(start)) > 0
        left = nodes & (leads | is_kept) & (receives | ~is_latent | is_kept)
        if (left == nodes).all():
            return Pruned(nodes, kept)
        nodes = left
        kept &= nodes[edges.source] & nodes[edges.target]


def threshold_of(values: Float[ndarray, " n"], share: float) -> float:
    """The smallest of the largest values that together make `share` of the sum."""
    if not len(values):
        return 0.0
    descending = np.sort(values)[::-1]
    total = np.cumsum(descending)
    place = int(np.searchsorted(total / max(total[-1], np.finfo(np.float64).tiny), share))
    return float(descending[min(place, len(values) - 1)])


def cumulative(values: Float[ndarray, " nodes"]) -> Float[ndarray, " nodes"]:
    """Of each node the share of the sum that it and all larger ones make [1]."""
    order = np.argsort(-values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.cumsum(values[order]) / max(values.sum(), np.finfo(np.float64).tiny)
    return found
