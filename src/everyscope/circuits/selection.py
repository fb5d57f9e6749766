"""Which latents' inputs are computed, in which order, and what of each row of inputs is kept.

The logits' rows come first; then, block by block, those of the latents that account for most of what is known so far. A row is
as long as there are sources; of it the strongest entries stay, and the sum of the others. Memory is therefore the rows of one
block, and edges_per_node numbers for each row of the past; a list of all pairs of nodes never exists.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.circuits.config import AttributionConfig
from everyscope.circuits.influence import Edges, influence
from everyscope.circuits.replacement import BUFFERS, Direction, Rows

ITEM_BYTES = 8
"""Of one entry of a row at most [bytes]."""
MAX_ROWS = 256
"""Rows of one block: more gain no speed [rows]."""
Say = Callable[[int, int], None]
"""Hears how many latents are done, of how many."""


class Tracer(Protocol):
    """What finds rows: `LocalReplacement`, or an approximation of it."""

    @property
    def num_latents(self) -> int:
        """Active latents; the first sources."""
        ...

    @property
    def num_sources(self) -> int:
        """All sources."""
        ...

    @property
    def row_bytes(self) -> int:
        """Of the gradient that one row takes on its way [bytes]."""
        ...

    def rows(self, latents: Int[Tensor, " some"], directions: list[Direction]) -> Rows:
        """What all sources send to these latents, and then to these directions."""
        ...


@dataclass
class Kept:
    """Rows as they are kept; nodes are sources, then targets."""

    node: list[int] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    rest_size: list[float] = field(default_factory=list)
    pre: list[float] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)
    violation: list[float] = field(default_factory=list)

    def add(self, nodes: Sequence[int], rows: Rows, most: int) -> None:
        """Keep of each row the `most` strongest entries that are not 0."""
        size = rows.weight.abs()
        strongest = size.topk(min(most, size.shape[1]), dim=1).indices.sort(1).values
        weight = rows.weight.gather(1, strongest).double()
        total, total_size = rows.weight.double().sum(1), size.double().sum(1)
        self.rest += (total - weight.sum(1)).tolist()
        self.rest_size += (total_size - weight.abs().sum(1)).clamp(min=0).tolist()
        for place, node in enumerate(nodes):
            is_any = weight[place] != 0
            self.node.append(node)
            self.source.append(strongest[place][is_any].to(torch.int32).cpu().numpy())
            self.weight.append(weight[place][is_any].float().cpu().numpy())
        self.pre += rows.pre.tolist()
        self.bias += rows.bias.tolist()
        self.violation += rows.violation.tolist()

    @property
    def edges(self) -> Edges:
        """All that was kept."""
        target = np.repeat(np.asarray(self.node, np.int64), [len(sources) for sources in self.source])
        return Edges(np.concatenate(self.source).astype(np.int64), target, np.concatenate(self.weight))


def rows_at_once(tracer: Tracer, config: AttributionConfig) -> int:
    """How many rows fit the memory that a block may take [rows]."""
    one = BUFFERS * tracer.row_bytes + 4 * tracer.num_sources * ITEM_BYTES
    return int(min(max(config.memory_gib * 2**30 // one, 1), MAX_ROWS))


def select(
    tracer: Tracer,
    directions: list[Direction],
    start: Float[np.ndarray, " nodes"],
    level: Int[np.ndarray, " nodes"],
    config: AttributionConfig,
    say: Say = lambda done, of: None,
) -> Kept:
    """The rows of all directions and of the max_latents most influential latents, as far as they have any influence and
    max_seconds allow.

    `start` and `level` are of all sources and then of the directions.
    """
    kept, most = Kept(), min(config.max_latents, tracer.num_latents)
    size = rows_at_once(tracer, config)
    no_latents = torch.zeros(0, dtype=torch.int64)
    for first in range(0, len(directions), size):
        part = directions[first : first + size]
        nodes = range(tracer.num_sources + first, tracer.num_sources + first + len(part))
        kept.add(nodes, tracer.rows(no_latents, part), config.edges_per_node)
    is_done = np.zeros(tracer.num_latents, bool)
    end = math.inf if config.max_seconds is None else time.monotonic() + config.max_seconds
    say(0, most)
    while is_done.sum() < most and time.monotonic() < end:
        worth = start[: tracer.num_latents].copy()
        if kept.node:
            edges = kept.edges
            worth += influence(edges, shares_kept(kept, edges), level, start)[: tracer.num_latents]
        worth[is_done] = 0
        count = min(size * config.rank_every, most - int(is_done.sum()), int((worth > 0).sum()))
        if not count:
            break
        chosen = np.argpartition(-worth, count - 1)[:count]
        for part in np.array_split(np.sort(chosen), -(-count // size)):
            if time.monotonic() < end:
                kept.add(part.tolist(), tracer.rows(torch.from_numpy(part), []), config.edges_per_node)
                is_done[part] = True
                say(int(is_done.sum()), most)
    return kept


def shares_kept(kept: Kept, edges: Edges) -> Float[np.ndarray, " edges"]:
    """Of each edge its share of all that its target receives, what was not kept included [1]."""
    counts = [len(sources) for sources in kept.source]
    total = [np.abs(weight.astype(np.float64)).sum() + rest for weight, rest in zip(kept.weight, kept.rest_size, strict=True)]
    return np.abs(edges.weight) / np.maximum(np.repeat(total, counts), np.finfo(np.float64).tiny)
