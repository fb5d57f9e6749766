"""Graphs through SAEs, where a suite has no transcoders: activation times gradient, an approximation.

The model runs as it is, with each SAE's site cut: what lies behind it starts from a copy, so that gradients end at the nearest
sites and edges are direct. Nodes are the SAEs' active latents, their errors, the tokens and the targets. An edge is what the
source writes times the gradient of the target's value there: exact to first order only, for attention, norms and MLPs bend on
the way. So edges do not add up to a node's value; `violation` says by how much they miss it.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from everyscope.base.errors import ConfigError
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.replacement import Direction, LayerLatents, Rows, Sources
from everyscope.sae.folded import Sae
from everyscope.sites.hooks import visiting
from everyscope.sites.logits import final_norm
from everyscope.sites.names import Site
from everyscope.sites.registry import HookPoint


class GradientTracer(Sources):
    """A model with SAEs on its residual stream, at most one behind each layer."""

    def __init__(self, frozen: FrozenModel, saes: Mapping[int, Sae], counted: Bool[Tensor, " ctx"]) -> None:
        """Make the pass. ConfigError where an SAE is not of the residual stream behind its layer."""
        for layer, sae in saes.items():
            if sae.is_transcoder or sae.metadata.site != Site("resid_post", layer) or sae.d_in != frozen.adapter.d_model:
                raise ConfigError(f"{sae!r}: gradients are traced through SAEs of the residual stream (resid_post) of one model")
        self.frozen, self.counted = frozen, counted.to(frozen.embed.device)
        self.coders = {layer: sae.with_tensors().to(frozen.embed) for layer, sae in saes.items()}
        self.layers: list[LayerLatents] = []
        self.errors: list[Float[Tensor, "ctx d_model"]] = []
        self._cuts: dict[int, Tensor] = {}
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

        def cut(layer: int, x: Tensor) -> Tensor:
            self._reads[layer] = x
            self._cuts[layer] = x.detach().clone().requires_grad_()
            return self._cuts[layer]

        def keep(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found["last"] = output[0, -1]

        self._reads: dict[int, Tensor] = {}
        places = [(adapter.hook_point(Site("resid_post", layer)), lambda x, layer=layer: cut(layer, x)) for layer in self.coders]
        with torch.enable_grad(), visiting([(HookPoint(adapter.block(0), "input"), enter), *places]):
            hook = final_norm(self.frozen.model, adapter).register_forward_hook(keep)
            try:
                self.frozen.model(input_ids=self.frozen.input_ids, use_cache=False)
            finally:
                hook.remove()
            for layer in range(self.frozen.num_layers):
                self._read(layer)
        return found["embed"], found["last"]

    def _read(self, layer: int) -> None:
        """The latents of one layer and what they leave; nothing where it has no SAE."""
        sae = self.coders.get(layer)
        if sae is None:
            none = torch.zeros(0, dtype=torch.int64, device=self.frozen.embed.device)
            empty = self.frozen.embed.new_zeros(0)
            self.layers.append(LayerLatents(none, none, empty, empty, empty))
            self.errors.append(torch.zeros_like(self.frozen.embed[0]))
            return
        read = self._reads[layer][0]
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
        cuts = [*self._cuts, -1]
        inputs = [*self._cuts.values(), self._embed]
        each = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        found = torch.autograd.grad(outputs, inputs, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
        for layer, g in zip(cuts, found, strict=True):
            if g is not None:
                self._send(layer, g[:, 0], weight)
        return Rows(weight.detach(), outputs.detach(), torch.zeros_like(outputs.detach()))

    def _send(self, layer: int, g: Float[Tensor, "rows ctx d_model"], weight: Float[Tensor, "rows sources"]) -> None:
        """Into `weight`: what a site's latents and errors send, or for layer -1 the tokens."""
        context, with_latents = self.frozen.context, self.num_latents
        if layer == -1:
            weight[:, self.num_sources - context :] = torch.einsum("rtd,td->rt", g, self.frozen.embed[0])
            return
        first = with_latents + layer * context
        weight[:, first : first + context] = torch.einsum("rtd,td->rt", g, self.errors[layer])
        at = self.layers[layer]
        written = self.coders[layer].W_dec[at.latent] * at.activation[:, None]
        weight[:, self.starts[layer] : self.starts[layer + 1]] = torch.einsum("rnd,nd->rn", g[:, at.position], written)
