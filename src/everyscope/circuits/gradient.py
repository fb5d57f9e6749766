"""Graphs through SAEs, where a suite has no transcoders: activation times gradient, an approximation.

The model runs as it is, with each SAE's site cut: what lies behind it starts from a copy, so that gradients end at the nearest
sites and edges are direct. With SAEs at every attn_out, mlp_out and resid_post (the sites of sparse feature circuits, Marks et
al. 2024), what a layer's stream receives is that of the layer before and what attention and MLP add, all as latents and errors.
Nodes are the SAEs' active latents, their errors, the tokens and the targets. An edge is what the source writes times the
gradient of the target's value there: exact to first order only, for attention, norms and MLPs bend on the way. So edges do not
add up to a node's value; `violation` says by how much they miss it.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from everyscope.base.errors import ConfigError
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.replacement import Direction, LayerLatents, Rows, Sources
from everyscope.sae.folded import Sae
from everyscope.sites.hooks import visiting
from everyscope.sites.logits import final_norm
from everyscope.sites.names import SUBLAYERS, Site
from everyscope.sites.registry import HookPoint


class GradientTracer(Sources):
    """A model with SAEs, at most one at each attn_out, mlp_out and resid_post."""

    def __init__(self, frozen: FrozenModel, saes: Mapping[Site, Sae], counted: Bool[Tensor, " ctx"]) -> None:
        """Make the pass; `saes` come in the order in which the model computes their sites.

        ConfigError for an SAE of another place or model.
        """
        for site, sae in saes.items():
            if sae.is_transcoder or site.kind not in SUBLAYERS or site.layer >= frozen.num_layers:
                raise ConfigError(f"{sae!r}: gradients are traced through SAEs of {', '.join(SUBLAYERS)} of one model")
            if sae.d_in != (width := frozen.adapter.width(site)):
                raise ConfigError(f"{sae!r} is not of this model, whose {site} is {width} wide")
        self.frozen, self.counted = frozen, counted.to(frozen.embed.device)
        self.coders = {site: sae.with_tensors().to(frozen.embed) for site, sae in saes.items()}
        self.sites = list(self.coders)
        self.layers: list[LayerLatents] = []
        self.errors: list[Float[Tensor, "ctx d_site"]] = []
        self._cuts: list[Tensor] = []
        self._embed, self._last = self._pass()

    @property
    def row_bytes(self) -> int:
        """Of the gradients that one row takes: attention's patterns count most [bytes]."""
        heads = self.frozen.adapter.config.num_attention_heads
        return self.frozen.embed.nbytes + heads * self.frozen.context**2 * self.frozen.embed.element_size()

    @property
    def logits(self) -> Float[Tensor, " vocab"]:
        """Of the same pass, before any soft-cap: the model's own."""
        return self.frozen.raw_logits(self._last.detach())

    def direction(self, vector: Float[Tensor, " d_model"]) -> Direction:
        """The target that reads `vector` from what the final norm gives at the last position."""
        return Direction(vector, float(self._last.detach() @ vector), 0.0)

    def _pass(self) -> tuple[Tensor, Tensor]:
        """The embedding, and what the final norm gives at the last position, with the way back."""
        adapter, found = self.frozen.adapter, dict[str, Tensor]()

        def enter(x: Tensor) -> Tensor:
            found["embed"] = x.detach().clone().requires_grad_()
            return found["embed"]

        def cut(site: Site, x: Tensor) -> Tensor:
            reads[site], cuts[site] = x, x.detach().clone().requires_grad_()
            return cuts[site]

        def keep(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found["last"] = output[0, -1]

        reads, cuts = dict[Site, Tensor](), dict[Site, Tensor]()
        places = [(adapter.hook_point(site), lambda x, site=site: cut(site, x)) for site in self.sites]
        with torch.enable_grad(), visiting([(HookPoint(adapter.block(0), "input"), enter), *places]):
            hook = final_norm(self.frozen.model, adapter).register_forward_hook(keep)
            try:
                self.frozen.model(input_ids=self.frozen.input_ids, use_cache=False)
            finally:
                hook.remove()
            for site, sae in self.coders.items():
                self._read(sae, reads[site][0])
        self._cuts = [cuts[site] for site in self.sites]
        return found["embed"], found["last"]

    def _read(self, sae: Sae, read: Float[Tensor, "ctx d_site"]) -> None:
        """The latents of one site and what they leave."""
        f = sae.encode(read) * self.counted[:, None]
        position, latent = f.nonzero(as_tuple=True)
        chosen = f[position, latent]
        self.layers.append(LayerLatents(position, latent, chosen.detach(), chosen, torch.zeros_like(chosen.detach())))
        written = f.detach() @ sae.W_dec + torch.where(self.counted[:, None], sae.b_dec, torch.zeros_like(sae.b_dec))
        self.errors.append(read.detach() - written)

    def rows(self, latents: Int[Tensor, " some"], directions: list[Direction]) -> Rows:
        """What all sources send to these latents, by their numbers, and then to these directions."""
        latents = latents.to(self.frozen.embed.device)
        pre = torch.cat([found.pre for found in self.layers])[latents]
        values = [pre, *(self._last @ direction.vector[:, None] for direction in directions)]
        outputs = torch.cat(values)
        weight = outputs.new_zeros(len(outputs), self.num_sources)
        inputs = [*self._cuts, self._embed]
        each = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        found = torch.autograd.grad(outputs, inputs, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
        for place, g in enumerate(found):
            if g is not None:
                self._send(place, g[:, 0], weight)
        return Rows(weight.detach(), outputs.detach(), torch.zeros_like(outputs.detach()))

    def _send(self, place: int, g: Float[Tensor, "rows ctx d_site"], weight: Float[Tensor, "rows sources"]) -> None:
        """Into `weight`: what the latents and errors of a site send, or behind the last site the tokens."""
        context, first = self.frozen.context, self.num_latents + place * self.frozen.context
        if place == len(self.sites):
            weight[:, first : first + context] = torch.einsum("rtd,td->rt", g, self.frozen.embed[0])
            return
        weight[:, first : first + context] = torch.einsum("rtd,td->rt", g, self.errors[place])
        at, start = self.layers[place], self.starts[place]
        written = self.coders[self.sites[place]].W_dec[at.latent] * at.activation[:, None]
        ends = torch.bincount(at.position, minlength=context).cumsum(0).tolist()
        for position, (begin, end) in enumerate(pairwise([0, *ends])):
            weight[:, start + begin : start + end] = g[:, position] @ written[begin:end].T
