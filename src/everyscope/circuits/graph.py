"""An attribution graph of a prompt: nodes, edges, what was left out, and how exact it is. Torch-free.

Nodes are latents, errors, tokens and targets, in this order. Edges lead from a source to a target and carry what the source adds
to the target's value before its threshold. A target's edges, what nodes outside the graph send (`rest`) and what biases send
(`bias`) add up to that value (`pre`), but for `violation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import Field

from everyscope.base.schema import Schema
from everyscope.circuits.influence import Edges, Pruned, Scores, influence, prune, scores
from everyscope.sites.names import SUBLAYERS, SiteKind

LATENT, ERROR, TOKEN, LOGIT = range(4)
KINDS = ("latent", "error", "token", "logit")
"""Names of the four kinds of nodes, by number."""
LARGEST_VIOLATION = 1e-3
"""A graph that breaks its own sums by more than this is not to be trusted [1]."""
Method = Literal["replacement", "gradient", "imported"]
"""replacement: exact, through transcoders. gradient: activation times gradient through SAEs of all sites, a first-order
approximation. imported: from circuit-tracer's JSON, which holds neither biases nor what was pruned, so no sum can be checked."""


class TargetFacts(Schema):
    """One target among the logits."""

    token: int
    """Id of the next token."""
    text: str
    """That token as text; of a contrast both."""
    against: int | None = None
    """Id of the token whose logit is subtracted."""
    probability: float
    """That the model gives the token [1]."""


class CoderFacts(Schema):
    """One transcoder or SAE of the graph."""

    layer: int
    """Of the model, from 0."""
    kind: SiteKind = "transcoder"
    """Of its site in this layer."""
    name: str
    """Its folder in the suite, or what it is."""
    width: int
    """Its latents [latents]."""


class GraphFacts(Schema):
    """What is known of a graph beside its nodes and edges."""

    prompt: str
    """As text."""
    tokens: tuple[str, ...]
    """Its tokens as text."""
    token_ids: tuple[int, ...]
    """And by number."""
    model: str
    """The language model."""
    num_layers: int
    """Of the model."""
    method: Method
    """How edges were found."""
    coders: tuple[CoderFacts, ...]
    """Whose latents are nodes."""
    targets: tuple[TargetFacts, ...]
    """The nodes of kind logit, in order."""
    replacement: float = 0.0
    """Replacement score of the whole graph, before it was pruned [1]."""
    completeness: float = 0.0
    """Completeness score of the same [1]."""
    violation: float = 0.0
    """The largest, of all nodes whose inputs were computed [1]."""
    num_active: int
    """Active latents of the prompt, in the graph or not [latents]."""
    logit_error: float
    """Largest difference between the logits of the replacement model, with errors, and the model's [1]."""
    title: str = ""
    """What people call it."""
    version: str = ""
    """Of everyscope."""
    settings: dict[str, float | int | str | None] = Field(default_factory=dict)
    """What it was made with."""
    labels: dict[str, str] = Field(default_factory=dict)
    """What an imported graph calls latents, by `coder_latent`, as in 3_417 of the fourth coder."""
    pins: tuple[str, ...] = ()
    """Nodes that are pinned when the page opens, by the names that circuit-tracer gives nodes."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Groups of them: a name, then nodes."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes as columns of equal length, and edges between them."""

    facts: GraphFacts
    kind: Int[ndarray, " nodes"]
    """LATENT, ERROR, TOKEN or LOGIT."""
    layer: Int[ndarray, " nodes"]
    """Of latents and errors; -1 for tokens, the number of layers for targets."""
    position: Int[ndarray, " nodes"]
    """In the prompt, BOS at 0."""
    index: Int[ndarray, " nodes"]
    """A latent's number, a token's id; -1 for errors."""
    coder: Int[ndarray, " nodes"]
    """Of latents and errors, the place in `facts.coders`; -1 for others."""
    activation: Float[ndarray, " nodes"]
    """Of latents, else 0."""
    start: Float[ndarray, " nodes"]
    """How much each target counts; 0 for all other nodes."""
    pre: Float[ndarray, " nodes"]
    """The value before the threshold of each node whose inputs were computed; 0 for others."""
    bias: Float[ndarray, " nodes"]
    """Of `pre`, what biases give, through all paths."""
    rest: Float[ndarray, " nodes"]
    """Of `pre`, what nodes outside the graph give, and edges too weak to be kept."""
    rest_size: Float[ndarray, " nodes"]
    """The sum of the sizes of the same."""
    violation: Float[ndarray, " nodes"]
    """|edges + rest + bias - pre| over the sum of sizes, as computed before anything was left out [1]."""
    edges: Edges

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.kind)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.kind == number).sum())} {name}s" for number, name in enumerate(KINDS))
        return f"Graph({self.facts.prompt!r}: {counts}, {len(self.edges.source)} edges, {self.words})"

    @property
    def words(self) -> str:
        """Its scores and its exactness in a few words."""
        found = f"replacement {self.facts.replacement:.2f}, completeness {self.facts.completeness:.2f}"
        match self.facts.method:
            case "replacement":
                return f"{found}, largest violation {self.largest_violation:.1e}"
            case "gradient":
                gap = f"half of the nodes miss their value by more than {self.typical_gap:.0%} of what they receive"
                return f"{found}, approximate: {gap}"
            case "imported":
                return "imported: holds no biases, so that its sums cannot be checked"

    @property
    def largest_violation(self) -> float:
        """Over all nodes whose inputs were computed [1]."""
        return float(self.violation.max(initial=0.0))

    @property
    def typical_gap(self) -> float:
        """The median over all nodes whose inputs were computed: of an approximation, how far its edges are from values [1]."""
        computed = self.violation[(self.pre != 0) & (self.kind != ERROR)]
        return float(np.median(computed)) if len(computed) else 0.0

    @cached_property
    def level(self) -> Int[ndarray, " nodes"]:
        """Edges lead from lower to higher levels: see `level_of`."""
        return level_of(self.layer, self.coder, [coder.kind for coder in self.facts.coders])

    @property
    def is_stacked(self) -> bool:
        """Whether a layer has several SAEs, one above the other."""
        return len({coder.layer for coder in self.facts.coders}) < len(self.facts.coders)

    @property
    def num_rows(self) -> int:
        """Rows of nodes between the tokens and the targets: one for each layer, or if it is stacked one for each sublayer."""
        return self.facts.num_layers * (len(SUBLAYERS) if self.is_stacked else 1)

    @cached_property
    def row(self) -> Int[ndarray, " nodes"]:
        """Where nodes are drawn: -1 for tokens, from 0 on for latents and errors, `num_rows` for targets."""
        places = np.where(self.is_stacked, self.level, self.layer)
        return np.where(self.kind == LOGIT, self.num_rows, np.where(self.kind == TOKEN, -1, places))

    @property
    def is_fixed(self) -> Bool[ndarray, " nodes"]:
        """Nodes that pruning leaves: tokens and targets."""
        return (self.kind == TOKEN) | (self.start > 0)

    @cached_property
    def influence(self) -> Float[ndarray, " nodes"]:
        """Of each node on the targets, through all paths in the graph."""
        return influence(self.edges, self.edges.shares(len(self)), self.level, self.start)

    @cached_property
    def scores(self) -> Scores:
        """Replacement and completeness of the graph as it is; `facts` has those of the whole one."""
        return scores(self.edges, self.level, self.start, self.kind == TOKEN, self.kind == ERROR)

    @property
    def coverage(self) -> float:
        """Of the sizes of all that nodes receive, weighted by influence, the share that edges of the graph carry [1]."""
        carried = np.bincount(self.edges.target, np.abs(self.edges.weight), len(self))
        weight = (self.influence + self.start) * (carried + self.rest_size > 0)
        share = carried / np.maximum(carried + self.rest_size, np.finfo(np.float64).tiny)
        return float((share * weight).sum() / max(weight.sum(), np.finfo(np.float64).tiny))

    def pruned(self, node_share: float = 0.8, edge_share: float = 0.98, kept: Bool[ndarray, " nodes"] | None = None) -> "Graph":
        """The graph of the nodes and edges that carry most of the influence [1], and of nodes that are `kept`; what falls goes to
        `rest`.
        """
        stays = self.is_fixed if kept is None else self.is_fixed | kept
        return self.part(prune(self.edges, self.level, self.start, stays, self.kind == LATENT, node_share, edge_share))

    def part(self, kept: Pruned) -> "Graph":
        """The graph of some nodes and edges; what the others sent to these goes to `rest`."""
        fallen = self.edges.where(~kept.edges)
        rest = self.rest + np.bincount(fallen.target, fallen.weight, len(self))
        rest_size = self.rest_size + np.bincount(fallen.target, np.abs(fallen.weight), len(self))
        number = np.cumsum(kept.nodes) - 1
        edges = self.edges.where(kept.edges)
        columns = {name: getattr(self, name)[kept.nodes] for name in COLUMNS}
        columns |= {"rest": rest[kept.nodes], "rest_size": rest_size[kept.nodes]}
        return replace(self, **columns, edges=Edges(number[edges.source], number[edges.target], edges.weight))


def level_of(layer: Int[ndarray, " n"], coder: Int[ndarray, " n"], kinds: Sequence[SiteKind]) -> Int[ndarray, " n"]:
    """What is computed later has a higher level: by layer, and in one of them attn_out, mlp_out, the stream behind the block.

    `coder` is the place of each node's coder in `kinds`, -1 where it has none.
    """
    rank = [SUBLAYERS.index(kind) if kind in SUBLAYERS else len(SUBLAYERS) - 1 for kind in kinds]
    return len(SUBLAYERS) * layer + np.array([*rank, len(SUBLAYERS) - 1])[coder]


COLUMNS = (
    "kind", "layer", "position", "index", "coder", "activation", "start", "pre", "bias", "rest", "rest_size", "violation",
)  # fmt: skip
"""The arrays with a number for each node."""
