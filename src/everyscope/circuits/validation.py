"""Does a graph say what matters? Its influences against what removing latents, one by one, does to the model."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import nn

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import Coders
from everyscope.circuits.config import Latent
from everyscope.circuits.graph import LATENT, LOGIT, Graph
from everyscope.circuits.intervene import Edit, intervene
from everyscope.sites.model import LanguageModel

FEWEST = 3
"""Latents without which ranks mean nothing [latents]."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Latents of a graph, removed one at a time."""

    latents: tuple[Latent, ...]
    influence: Float[np.ndarray, " latents"]
    """As the graph has it."""
    measured: Float[np.ndarray, "latents targets"]
    """Change of each target's value in the model."""
    predicted: Float[np.ndarray, "latents targets"]
    """And by the graph."""
    weight: Float[np.ndarray, " targets"]

    @property
    def is_finite(self) -> Bool[np.ndarray, " latents"]:
        """Whether the pass without each latent gave numbers: with norms held, nothing keeps a deep model's later MLPs small."""
        return np.asarray(np.isfinite(self.measured).all(1))

    @property
    def effect(self) -> Float[np.ndarray, " latents"]:
        """Sizes of the measured changes, weighted by the targets."""
        return np.abs(self.measured) @ self.weight

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of influence and effect, over passes that did not overflow [1]."""
        return spearman(self.influence[self.is_finite], self.effect[self.is_finite])

    @property
    def prediction_correlation(self) -> float:
        """Spearman's, of predicted and measured changes of the first target, signs included [1]."""
        return spearman(self.predicted[self.is_finite, 0], self.measured[self.is_finite, 0])

    @property
    def words(self) -> str:
        """Both in a line."""
        overflows = int((~self.is_finite).sum())
        left_out = f" ({overflows} passes overflowed and are left out)" if overflows else ""
        return (
            f"{len(self.latents)} latents removed one by one: rank correlation of influence and effect "
            f"{self.rank_correlation:.2f}, of predicted and measured change {self.prediction_correlation:.2f}{left_out}"
        )


def validate(
    model: nn.Module | LanguageModel,
    transcoders: Coders,
    graph: Graph,
    *,
    num_latents: int = 200,
    freezes_attention: bool = False,
    freezes_norms: bool = False,
) -> Validation:
    """Remove latents of the graph one by one: all of them, or `num_latents` evenly spaced by rank of influence.

    ConfigError where the graph has too few, or its target is a latent.
    """
    nodes = np.flatnonzero(graph.kind == LATENT)
    is_target = graph.kind == LOGIT
    num_logits = int(is_target.sum())
    if len(nodes) < FEWEST or not num_logits:
        raise ConfigError(f"the graph has {len(nodes)} latents and {num_logits} logits; expected {FEWEST} and 1 at least")
    ranked = nodes[np.argsort(-graph.influence[nodes], kind="stable")]
    chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(num_latents, len(ranked))).round().astype(int))]
    latents = tuple(Latent(int(graph.layer[node]), int(graph.position[node]), int(graph.index[node])) for node in chosen)
    variants = [[Edit(latent)] for latent in latents]
    held = {"freezes_attention": freezes_attention, "freezes_norms": freezes_norms}
    effects = intervene(model, transcoders, graph, variants, **held)
    weight = graph.start[is_target] / graph.start[is_target].sum()
    return Validation(latents, graph.influence[chosen], effects.measured, effects.predicted, weight)


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """The correlation of ranks, ties at their mean rank; 0 where one of both is constant."""
    first, second = ranks(one), ranks(other)
    first, second = first - first.mean(), second - second.mean()
    size = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / size) if size else 0.0


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 0; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]
