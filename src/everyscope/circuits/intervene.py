"""Interventions: what the model does when latents are set, scaled or removed, beside what a graph predicts.

Measured in the model itself: the output of an MLP changes by what the edited latents write, all later modules run as they are,
and what transcoders leave out stays. Attention patterns and norms' sizes may be held as they were, as in the graph. Predicted:
an edited latent's edges shrink or grow with it, and so do those of every latent that it reaches, level by level; none falls
below 0.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import Coders, by_site
from everyscope.circuits.config import Latent
from everyscope.circuits.frozen import FrozenModel, attending
from everyscope.circuits.graph import LATENT, LOGIT, Graph
from everyscope.circuits.replacement import fitting, reading
from everyscope.sae.folded import Sae
from everyscope.sites.hooks import visiting
from everyscope.sites.logits import final_norm
from everyscope.sites.model import LanguageModel, bare
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import forward_replaced

BATCH = 16
"""Variants of the prompt that run at once [variants]."""


@dataclass(frozen=True)
class Edit:
    """One latent at one position becomes factor * its activation + value; the defaults remove it."""

    latent: Latent
    factor: float = 0.0
    value: float = 0.0


@dataclass(frozen=True, eq=False)
class Effects:
    """Of each variant, what it changes: in the model, and by the graph."""

    measured: Float[np.ndarray, "variants targets"]
    """Change of each target's value, a logit less the mean of all logits or a contrast, before any soft-cap."""
    predicted: Float[np.ndarray, "variants targets"]
    latents_measured: Float[np.ndarray, "variants nodes"]
    """Change of each latent's activation; 0 for nodes that are no latents."""
    latents_predicted: Float[np.ndarray, "variants nodes"]
    logits: Float[np.ndarray, "variants vocab"]
    """The model's logits at the last position, as it gives them."""


def intervene(
    model: nn.Module | LanguageModel,
    transcoders: Coders,
    graph: Graph,
    variants: Sequence[Sequence[Edit]],
    *,
    freezes_attention: bool = False,
    freezes_norms: bool = False,
) -> Effects:
    """The prompt of a graph, once for each variant with all its edits; with attention and norms held as in the graph, if asked.

    ConfigError for an edit of a latent that no transcoder has or of a position outside the prompt, and for another model's graph.
    """
    worker = Intervention(model, transcoders, graph, freezes_attention, freezes_norms)
    worker.check(variants)
    clean = worker.run([[]])
    parts = [worker.run(variants[first : first + BATCH]) for first in range(0, len(variants), BATCH)]
    targets, latents, logits = (
        np.concatenate([part[place] for part in parts]) - (clean[place] if place < 2 else 0) for place in range(3)
    )
    moved = np.stack([predicted(graph, [(worker.node_of(edit.latent), edit) for edit in edits]) for edits in variants])
    is_latent = graph.kind == LATENT
    return Effects(targets, moved[:, graph.kind == LOGIT], latents, np.where(is_latent, moved, 0.0), logits)


def predicted(graph: Graph, edits: Sequence[tuple[int | None, Edit]]) -> Float[np.ndarray, " nodes"]:
    """Change of each node's value by the graph alone; an edit of a latent that is no node (None) changes nothing."""
    change, activation = np.zeros(len(graph)), np.where(graph.kind == LATENT, graph.activation, 1.0)
    is_edited = np.zeros(len(graph), bool)
    for node, edit in edits:
        if node is not None:
            change[node] = (edit.factor - 1) * graph.activation[node] + edit.value
            is_edited[node] = True
    for level in np.unique(graph.level[graph.edges.target]):
        edges = graph.edges.where(graph.level[graph.edges.target] == level)
        share = change[edges.source] / activation[edges.source]
        received = np.bincount(edges.target, edges.weight * share, len(graph))
        received = np.where(graph.kind == LATENT, np.maximum(received, -graph.activation), received)
        change += np.where(is_edited, 0.0, received)
    return change


class Intervention:
    """A model ready to run variants of one prompt."""

    def __init__(
        self,
        model: nn.Module | LanguageModel,
        transcoders: Coders,
        graph: Graph,
        freezes_attention: bool,
        freezes_norms: bool,
    ) -> None:
        """Make the clean pass."""
        self.model: Any = bare(model)
        self.graph, self.freezes_attention, self.freezes_norms = graph, freezes_attention, freezes_norms
        self.adapter = adapter_of(self.model)
        if graph.facts.method != "replacement" or graph.facts.num_layers != self.adapter.num_layers:
            raise ConfigError(f"the graph is of {graph.facts.model} with {graph.facts.num_layers} layers; give its own model")
        self.frozen = FrozenModel(self.model, self.adapter, torch.tensor([graph.facts.token_ids]))
        self.coders: dict[int, Sae] = {
            site.layer: fitting(coder, self.adapter, site.layer).to(self.frozen.embed)
            for site, coder in by_site(transcoders)[1].items()
        }
        rows = self.frozen.unembedding.to(self.frozen.embed)
        mean = rows.mean(0)
        self.vectors = [rows[one.token] - (mean if one.against is None else rows[one.against]) for one in graph.facts.targets]
        keys = zip(graph.kind.tolist(), graph.layer.tolist(), graph.position.tolist(), graph.index.tolist(), strict=True)
        self.nodes = {Latent(layer, at, number): node for node, (kind, layer, at, number) in enumerate(keys) if kind == LATENT}

    def node_of(self, latent: Latent) -> int | None:
        """The node of a latent, None where the graph does not have it."""
        return self.nodes.get(latent)

    def check(self, variants: Sequence[Sequence[Edit]]) -> None:
        """ConfigError for an edit that cannot be made."""
        for edit in (edit for edits in variants for edit in edits):
            coder = self.coders.get(edit.latent.layer)
            width = 0 if coder is None else coder.d_sae
            if not (0 <= edit.latent.latent < width and 0 <= edit.latent.position < self.frozen.context):
                raise ConfigError(
                    f"{edit.latent}: the transcoder of that layer has {width} latents, the prompt positions 0 to "
                    f"{self.frozen.context - 1}; choose one of these"
                )

    @torch.no_grad()
    def run(self, variants: Sequence[Sequence[Edit]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of the targets, activations of the graph's latents [variants nodes], and logits, each in absolute terms."""
        activations, behind, reads = np.zeros((len(variants), len(self.graph))), dict[str, Tensor](), dict[int, Tensor]()
        with ExitStack() as stack:
            if self.freezes_attention:
                for block in self.frozen.blocks:
                    stack.enter_context(attending(block.attention, block.attend))
            if self.freezes_norms:
                for norm, still in self.frozen.norms:
                    stack.enter_context(forward_replaced(norm, still))
            for layer, coder in self.coders.items():
                stack.enter_context(visiting(self._visits(layer, coder, variants, reads)))

            def keep(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                behind["last"] = output[:, -1]

            stack.callback(final_norm(self.model, self.adapter).register_forward_hook(keep).remove)
            self.model(input_ids=self.frozen.input_ids.repeat(len(variants), 1), use_cache=False)
        for layer, read in reads.items():
            here = np.flatnonzero((self.graph.kind == LATENT) & (self.graph.layer == layer))
            f = self.coders[layer].encode(read)
            activations[:, here] = f[:, self.graph.position[here], self.graph.index[here]].cpu().numpy()
        last = behind["last"]
        empty = last.new_zeros(len(variants), 0)
        values = torch.stack([last @ vector for vector in self.vectors], 1) if self.vectors else empty
        logits = self.frozen.capped(self.frozen.raw_logits(last))
        return values.double().cpu().numpy(), activations, logits.cpu().numpy()

    def _visits(self, layer: int, coder: Sae, variants: Sequence[Sequence[Edit]], reads: dict[int, Tensor]) -> Any:
        edits = [(place, edit) for place, some in enumerate(variants) for edit in some if edit.latent.layer == layer]
        numbers = [(place, edit.latent.position, edit.latent.latent) for place, edit in edits]
        which, position, latent = torch.tensor(numbers, dtype=torch.int64, device=coder.device).reshape(-1, 3).T
        factor, value = (coder.b_enc.new_tensor([getattr(edit, name) for _, edit in edits]) for name in ("factor", "value"))

        def see(x: Tensor) -> None:
            reads[layer] = x

        def edited(y: Tensor) -> Tensor | None:
            if not edits:
                return None
            f = coder.encode(reads[layer][which, position])[torch.arange(len(latent)), latent]
            moved = ((factor - 1) * f + value)[:, None] * coder.W_dec[latent]
            return y.index_put((which, position), moved.to(y), accumulate=True)

        added = self.adapter.hook_point(Site("mlp_out", layer))
        return [(reading(self.adapter, coder, layer), see), (added, edited)]
