"""What a direction at a site adds to the logits on the straight way: no attention head or MLP on it, only projection and norms.

A norm divides by a size that depends on the token; held still, it is a linear map: perhaps a centring (LayerNorm), then a gain
for each coordinate. Gains are found by running the norm, not by reading its weights: Gemma multiplies by 1 + w, Llama by w,
and their files look alike. Without them the strongest tokens of a direction come out wrong.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everyscope.base.errors import ModelError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.sites.registry import ModelAdapter, adapter_of

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
"""What families call the norm behind the last block; it lies beside the blocks."""
NORM_TOLERANCE = 1e-3
"""Largest relative error with which a norm must be a gain on scaled coordinates [1]; its epsilon takes some of it."""


@dataclass(frozen=True, eq=False)
class Gain:
    """A norm with its size held still, up to that size: the linear map d -> (d - mean d if centring) * gain."""

    gain: Float[Tensor, " d_model"]
    is_centring: bool
    """True for LayerNorm, False for RMSNorm."""

    def __call__(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The directions behind the norm."""
        if self.is_centring:
            directions = directions - directions.mean(1, keepdim=True)
        return directions * self.gain


@dataclass(frozen=True, eq=False)
class LogitPath:
    """The straight way from one site to the logits, on the model's device; float32, but for the unembedding."""

    projection: Float[Tensor, "d_in d_model"] | None
    """W_O, for a site before it."""
    post_norm: Gain | None
    """What attention adds through, where the site is before it."""
    final_norm: Gain
    unembedding: Float[Tensor, "vocab d_model"]
    """In the model's own format."""
    words: str
    """The way in words, for captions."""
    softcap: float | None
    """Logits are squashed to this size afterwards; that changes their sizes and not their order."""

    def through_norms(self, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_model"]:
        """What meets the unembedding: its product with that is what each direction adds to the logits before any soft-cap, up
        to the sizes of the norms, which vary by token.
        """
        residual = self.raw(directions)
        if self.post_norm is not None:
            residual = self.post_norm(residual)
        return self.final_norm(residual)

    def raw(self, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_model"]:
        """The same without any norm, as other tools have it: logits are d @ W_U, or d @ W_O @ W_U."""
        want = self.unembedding.shape[1] if self.projection is None else self.projection.shape[0]
        if directions.shape[-1] != want:
            raise ShapeMismatch(f"directions have d_in={directions.shape[-1]}, the site {want}; are they of another site?")
        directions = directions.to(self.final_norm.gain)
        return directions if self.projection is None else directions @ self.projection


def logit_path(model: nn.Module, site: Site) -> LogitPath:
    """The straight way from `site`; ModelError where the model has no head or its norms are of a kind that we do not know."""
    adapter = adapter_of(model)
    adapter.block(site.layer)
    projection, post_norm, words = None, None, []
    if site.kind == "attn_out":
        projection = _projection(adapter.projected(site.layer).module)
        words.append("W_O")
        if adapter.family.attention_added != adapter.family.attention:
            post_norm = gain_of(adapter.attention_added(site.layer).module, adapter.d_model)
            words.append("post-attention norm's gain")
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; load it with its head (AutoModelForCausalLM)")
    return LogitPath(
        projection=projection,
        post_norm=post_norm,
        final_norm=gain_of(final_norm(model, adapter), adapter.d_model),
        unembedding=head.weight.detach(),
        words=", ".join([*words, "final norm's gain", "unembedding"]),
        softcap=getattr(adapter.config, "final_logit_softcapping", None),
    )


def final_norm(model: nn.Module, adapter: ModelAdapter) -> nn.Module:
    """The norm between the last block and the head; ModelError where it is not beside the blocks."""
    for path in adapter.family.blocks:
        parent = path.rpartition(".")[0]
        for name in FINAL_NORMS:
            try:
                return model.get_submodule(f"{parent}.{name}")
            except AttributeError:
                continue
    raise ModelError(
        f"{type(model).__name__} has no {', '.join(FINAL_NORMS)} beside its blocks; add its final norm to sites/logits.py"
    )


@torch.no_grad()
def gain_of(norm: nn.Module, d_model: int) -> Gain:
    """The linear map that `norm` is but for its size, found by running it; ModelError where it is no such map.

    A constant row shows whether it centres. The odd part of its answer to +1, -1, ... divided by those signs is the gain, for
    both kinds: that row's mean is 0 (two rows, shifted by one, so that an odd width has it too) and its size 1.
    """
    norm = copy.deepcopy(norm).float()
    weight = next(norm.parameters())
    constant = torch.ones(1, d_model, device=weight.device)
    is_centring = _odd(norm, constant).norm() < NORM_TOLERANCE * _odd(norm, _probe(d_model, weight.device)).norm()
    signs = constant.clone()
    signs[:, 1::2] = -1
    if not is_centring:
        gain = _odd(norm, signs) / signs
    else:  # an odd width leaves one coordinate out of a row of mean 0: the first, then the last
        rows = torch.cat([signs, signs.roll(1, 1)]) if d_model % 2 else signs
        if d_model % 2:
            rows[0, -1], rows[1, 0] = 0, 0
        size = rows.square().mean(1, keepdim=True).sqrt()
        answers = _odd(norm, rows) * size
        gain = (answers * rows).sum(0, keepdim=True) / rows.square().sum(0, keepdim=True)
    found = Gain(gain[0], bool(is_centring))
    probe = _probe(d_model, weight.device)
    centred = probe - probe.mean(1, keepdim=True) if is_centring else probe
    want = found(probe) / centred.square().mean(1, keepdim=True).sqrt()
    error = float((_odd(norm, probe) - want).norm() / want.norm())
    if not error <= NORM_TOLERANCE:  # so that NaN fails too
        raise ModelError(
            f"{type(norm).__name__} is neither RMSNorm nor LayerNorm (relative error {error:.2g}, allowed {NORM_TOLERANCE:.2g}); "
            "the logits of directions would mean nothing: teach sites/logits.py this norm"
        )
    return found


def _odd(norm: nn.Module, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The answer to x without the norm's bias."""
    return (norm(x) - norm(-x)) / 2


def _probe(d_model: int, device: torch.device) -> Float[Tensor, "1 d_model"]:
    """A row without any symmetry, of about unit size."""
    return torch.sin(torch.arange(1, d_model + 1, device=device, dtype=torch.float32).square())[None] + 0.3


def _projection(module: nn.Module) -> Float[Tensor, "d_in d_model"]:
    """The matrix of W_O that row vectors are multiplied by."""
    weight = module.get_parameter("weight").detach().float()
    return weight.T if isinstance(module, nn.Linear) else weight  # GPT-2's Conv1D keeps [d_in, d_out]
