"""The local replacement model of one prompt: a frozen model whose MLPs are transcoders' latents, their skips, and errors.

Its nodes are active latents, the error of each MLP at each token (what its transcoder leaves out; all of it where there is no
transcoder or a token is special), the embeddings of the tokens, and targets among the logits. With errors its stream is the
model's own. Everything between nodes is affine, so that a node's value before its threshold is the sum of what all nodes before
it send there and of what biases send: `rows` finds the former backwards, `biases` the latter forwards, and `Rows.violation`
compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.base.errors import ConfigError
from everyscope.circuits.frozen import FrozenModel, Write
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site
from everyscope.sites.norms import mlp_norm_of
from everyscope.sites.registry import HookPoint, ModelAdapter

BUFFERS = 8
"""Copies of a row's gradient on the stream that pulling it back through a block takes at most."""
GATHERED_BYTES = 1 << 26
"""Decoder rows that are gathered at once [bytes]."""


@dataclass(frozen=True, eq=False)
class LayerLatents:
    """The active latents of one layer, by position and number."""

    position: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    pre: Float[Tensor, " n"]
    """x @ W_enc + b_enc of each, which is its activation where it is active; of `GradientTracer`, with the way back to the sites
    before."""
    bias: Float[Tensor, " n"]
    """Of `pre`, what b_enc and the paths of all other biases give."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A target among the logits: a read vector behind the final norm at the last position."""

    vector: Float[Tensor, " d_model"]
    pre: float
    """Its value in the replacement model, and what of it biases give."""
    bias: float


@dataclass(frozen=True, eq=False)
class Rows:
    """What every source sends to some targets."""

    weight: Float[Tensor, "rows sources"]
    pre: Float[Tensor, " rows"]
    bias: Float[Tensor, " rows"]

    @property
    def violation(self) -> Float[Tensor, " rows"]:
        """|sum of all sent + biases - value|, relative to the sum of all sizes sent."""
        sent = self.weight.double()
        gap = sent.sum(1) + self.bias.double() - self.pre.double()
        return gap.abs() / (sent.abs().sum(1) + self.bias.double().abs()).clamp(min=torch.finfo(torch.float64).tiny)


class Sources:
    """What sends: the active latents by site, position and number; then the errors by site and position; then the tokens."""

    frozen: FrozenModel
    sites: list[Site]
    """Where latents and errors sit, in the order in which the model computes them."""
    layers: list[LayerLatents]
    """The latents of each site."""

    @cached_property
    def starts(self) -> list[int]:
        """Of each site the number of its first latent, and last the number of all."""
        return [0, *accumulate(len(layer.latent) for layer in self.layers)]

    @property
    def num_latents(self) -> int:
        """Active latents of all sites."""
        return self.starts[-1]

    @property
    def num_sources(self) -> int:
        """Latents, errors and tokens."""
        return self.num_latents + (len(self.sites) + 1) * self.frozen.context


class LocalReplacement(Sources):
    """A frozen model and the transcoders of its layers."""

    def __init__(self, frozen: FrozenModel, coders: Mapping[int, Sae], counted: Bool[Tensor, " ctx"]) -> None:
        """`counted` is True where latents count; elsewhere all that an MLP adds is error.

        ConfigError where a coder is no transcoder of its layer's MLP.
        """
        self.frozen, self.counted = frozen, counted.to(frozen.embed.device)
        self.coders = {layer: fitting(coder, frozen.adapter, layer).to(frozen.embed) for layer, coder in coders.items()}
        self.sites = [Site("transcoder", layer) for layer in range(frozen.num_layers)]
        self.reads = [reading(frozen.adapter, self.coders.get(layer), layer) for layer in range(frozen.num_layers)]
        self.layers: list[LayerLatents] = []
        self.errors: list[Float[Tensor, "ctx d_model"]] = []
        with torch.no_grad():
            self.final_stream, self.final_bias = self._forward()

    @property
    def row_bytes(self) -> int:
        """Of the gradient that one row takes through the layers, and of two copies of attention's pattern, which batched
        products make for each row [bytes].
        """
        heads = self.frozen.adapter.config.num_attention_heads
        pattern = heads * self.frozen.context**2 * self.frozen.embed.element_size()
        return self.frozen.embed.nbytes + 2 * pattern // BUFFERS

    @property
    def logits(self) -> Float[Tensor, " vocab"]:
        """Of the replacement model at the last position, before any soft-cap."""
        return self.frozen.raw_logits(self.frozen.final(self.final_stream)[0, -1])

    def direction(self, vector: Float[Tensor, " d_model"]) -> Direction:
        """The target that reads `vector` from what the final norm gives at the last position."""
        behind = [self.frozen.final(stream)[0, -1] @ vector for stream in (self.final_stream, self.final_bias)]
        return Direction(vector, behind[0].item(), behind[1].item())

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Both streams through all layers: the replacement model's, and that of its biases alone, without any source."""
        stream, bias = self.frozen.embed, torch.zeros_like(self.frozen.embed)
        for layer in range(self.frozen.num_layers):
            added = self.frozen.added(layer)
            read, stream = self.frozen.run_block(layer, stream, lambda _, added=added: added[None], self.reads[layer])
            bias_read, bias = self.frozen.run_block(layer, bias, partial(self._without_latents, layer), self.reads[layer])
            self.layers.append(self._active(layer, read[0], bias_read[0]))
            self.errors.append(added - self._latents_sum(layer) - self._without_latents(layer, read)[0])
        return stream, bias

    def _active(self, layer: int, read: Float[Tensor, "ctx d_in"], bias_read: Float[Tensor, "ctx d_in"]) -> LayerLatents:
        coder = self.coders.get(layer)
        if coder is None:
            none = torch.zeros(0, dtype=torch.int64, device=read.device)
            return LayerLatents(none, none, *(read.new_zeros(0) for _ in range(3)))
        f = coder.encode(read) * self.counted[:, None]
        position, latent = f.nonzero(as_tuple=True)
        active = f[position, latent]
        bias = torch.cat(
            [
                torch.einsum("nd,dn->n", bias_read[places], coder.W_enc[:, latents]) + coder.b_enc[latents]
                for places, latents in zip(*_chunks(position, latent, coder.d_in * read.element_size()), strict=True)
            ]
        )
        return LayerLatents(position, latent, active, active, bias)

    def _latents_sum(self, layer: int) -> Float[Tensor, "ctx d_model"]:
        """What the active latents of a layer write at each position."""
        found, total = self.layers[layer], torch.zeros_like(self.frozen.embed[0])
        if layer in self.coders:
            rows = self.coders[layer].W_dec
            for chunk in torch.arange(len(found.latent), device=total.device).split(GATHERED_BYTES // rows[0].nbytes):
                written = rows[found.latent[chunk]] * found.activation[chunk, None]
                total.index_add_(0, found.position[chunk], written)
        return total

    def _without_latents(self, layer: int, read: Float[Tensor, "1 ctx d_in"]) -> Float[Tensor, "1 ctx d_model"]:
        """What the transcoder of a layer writes besides its latents: b_dec and the skip; nothing at special tokens."""
        coder = self.coders.get(layer)
        if coder is None:
            return torch.zeros_like(self.frozen.embed)
        return torch.where(self.counted[:, None], coder.b_dec, coder.b_dec.new_zeros(())) + self._skipped(layer, read)

    def _skipped(self, layer: int, read: Float[Tensor, "1 ctx d_in"]) -> Float[Tensor, "1 ctx d_model"]:
        """The linear part of what an MLP's stand-in makes of what it reads."""
        coder = self.coders.get(layer)
        if coder is None or coder.W_skip is None:
            return torch.zeros_like(self.frozen.embed)
        return self.counted[:, None] * (read @ coder.W_skip)

    @torch.no_grad()
    def rows(self, latents: Int[Tensor, " some"], directions: list[Direction]) -> Rows:
        """What all sources send to these latents, by their numbers, and then to these directions."""
        final, count, latents = self.frozen.final, len(latents), latents.to(self.frozen.embed.device)
        g = self.frozen.embed.new_zeros(count + len(directions), self.frozen.context, self.frozen.adapter.d_model)
        weight = g.new_zeros(len(g), self.num_sources)
        if directions:
            g[count:, -1] = final.pulled_back(torch.stack([direction.vector for direction in directions]), -1)
        pre, bias = g.new_zeros(2, len(g))
        for place, direction in enumerate(directions, count):
            pre[place], bias[place] = direction.pre, direction.bias
        is_begun = bool(directions)
        for layer in reversed(range(self.frozen.num_layers)):
            start, stop = self.starts[layer], self.starts[layer + 1]
            here = ((latents >= start) & (latents < stop)).nonzero()[:, 0]
            if not is_begun and not len(here):
                continue
            self._send(layer, g, weight)
            onto_read = self._read_here(layer, here, latents[here] - start, g)
            pre[here], bias[here] = self.layers[layer].pre[latents[here] - start], self.layers[layer].bias[latents[here] - start]
            g, is_begun = self._pulled_back(layer, g, onto_read), True
        weight[:, self.num_sources - self.frozen.context :] = torch.einsum("rtd,td->rt", g, self.frozen.embed[0])
        return Rows(weight, pre, bias)

    def _read_here(self, layer: int, rows: Tensor, chosen: Tensor, g: Tensor) -> Float[Tensor, "rows ctx d_in"]:
        """The gradient at what the transcoder of `layer` reads: the encoder columns of the targets that sit here."""
        coder, found = self.coders.get(layer), self.layers[layer]
        onto = g.new_zeros(*g.shape[:2], self.frozen.adapter.d_model if coder is None else coder.d_in)
        if coder is not None and len(rows):
            onto[rows, found.position[chosen]] = coder.W_enc[:, found.latent[chosen]].T
        return onto

    def _send(self, layer: int, g: Float[Tensor, "rows ctx d_model"], weight: Float[Tensor, "rows sources"]) -> None:
        """Into `weight`: what the writes of `layer`, its latents and errors, send along g."""
        first = self.num_latents + layer * self.frozen.context
        weight[:, first : first + self.frozen.context] = torch.einsum("rtd,td->rt", g, self.errors[layer])
        found, start = self.layers[layer], self.starts[layer]
        if not len(found.latent):
            return
        decoder = self.coders[layer].W_dec
        ends = torch.bincount(found.position, minlength=self.frozen.context).cumsum(0).tolist()
        begin = 0
        for position, end in enumerate(ends):
            if end > begin:
                written = decoder[found.latent[begin:end]] * found.activation[begin:end, None]
                weight[:, start + begin : start + end] = g[:, position] @ written.T
            begin = end

    def _pulled_back(self, layer: int, g: Tensor, onto_read: Tensor) -> Float[Tensor, "rows ctx d_model"]:
        """The gradient on the stream before a block, of one behind it and one at what its transcoder reads."""
        write: Write = partial(self._skipped, layer)
        resid = torch.zeros_like(self.frozen.embed).requires_grad_()
        with torch.enable_grad():
            outputs = self.frozen.run_block(layer, resid, write, self.reads[layer])
            (pulled,) = torch.autograd.grad(outputs, (resid,), (onto_read[:, None], g[:, None]), is_grads_batched=True)
        return pulled[:, 0]


def fitting(coder: Sae, adapter: ModelAdapter, layer: int) -> Sae:
    """The transcoder in a form that a model's sites give; ConfigError where it is none of this layer's MLP."""
    reads, writes = coder.metadata.site, coder.metadata.target
    wanted = (Site("mlp_in", layer), Site("resid_mid", layer))
    if reads not in wanted or writes != Site("mlp_out", layer):
        raise ConfigError(f"{coder!r} reads {reads} and writes {writes}; expected a transcoder of layer {layer}'s MLP")
    if (coder.d_in, coder.d_out) != (adapter.d_model, adapter.d_model):
        raise ConfigError(f"{coder!r} is not of this model, whose d_model is {adapter.d_model}")
    if coder.metadata.convention == "normalised":
        norm = mlp_norm_of(adapter, layer)
        return to_convention(coder, "mlp_input", norm.gain, norm.bias)
    return coder.with_tensors()


def reading(adapter: ModelAdapter, coder: Sae | None, layer: int) -> HookPoint:
    """The place that a layer's transcoder reads."""
    known = None if coder is None else coder.metadata.site
    return adapter.hook_point(Site("mlp_in", layer) if known is None else known)


def _chunks(position: Tensor, latent: Tensor, row_bytes: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    size = max(1, GATHERED_BYTES // row_bytes)
    return position.split(size), latent.split(size)
