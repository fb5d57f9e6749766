"""The proof that we hook what we claim: each block's output is its input plus what attention and MLP add, and what the MLP adds
is made, by the MLP module, of what we say it reads.

Architectures where that does not hold (BLOOM adds inside its sublayers, Granite scales what it adds) are refused, and so is
a registry entry that takes, say, Gemma 2's `mlp` where the block adds its post-norm's output.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from everyscope.base.errors import ModelError
from everyscope.sites.hooks import Visitor, visiting
from everyscope.sites.names import Site
from everyscope.sites.registry import HookPoint, ModelAdapter, adapter_of

TOY_BATCH, TOY_CONTEXT = 2, 16
"""Size of the pass that the check makes [sequences] and [tokens]."""


@torch.no_grad()
def check_residual_identity(model: nn.Module, tolerance: float | None = None, adapter: ModelAdapter | None = None) -> float:
    """Check every layer on a short batch of arbitrary tokens and return the largest error [1].

    Four errors per layer, each at its worst token: of resid_post = resid_pre + attention's part + MLP's part, relative to
    the longest of these four vectors, of W_O's output against the attention module's, of the MLP module run again on mlp_in
    against mlp_out, and of the norm before it run again on resid_mid against mlp_in. `adapter` is the registry's
    unless given; `tolerance` is `default_tolerance` of the model's dtype unless given. ModelError, naming layer and
    error, where one is larger.
    """
    adapter = adapter_of(model) if adapter is None else adapter
    tolerance = default_tolerance(next(model.parameters()).dtype) if tolerance is None else tolerance
    places: dict[tuple[int, str], HookPoint] = {}
    for layer, block in enumerate(adapter.blocks):
        places[layer, "pre"] = HookPoint(block, "input")
        places[layer, "post"] = adapter.hook_point(Site("resid_post", layer))
        places[layer, "attention"] = adapter.attention_added(layer)
        places[layer, "mlp"] = adapter.hook_point(Site("mlp_out", layer))
        places[layer, "projected"] = adapter.projected(layer)
        places[layer, "attended"] = adapter.attention(layer)
        places[layer, "mlp_in"] = adapter.hook_point(Site("mlp_in", layer))
        places[layer, "mid"] = adapter.hook_point(Site("resid_mid", layer))
    found = _run(model, places, adapter.config.vocab_size)
    worst = 0.0
    for layer in range(adapter.num_layers):
        for complaint, error in _errors(adapter, found, layer):
            if not error <= tolerance:  # so that NaN fails too
                raise ModelError(
                    f"{type(model).__name__}, layer {layer}: {complaint} (relative error {error:.2g}, allowed {tolerance:.2g}); "
                    "SAEs on its sublayers would mean nothing: use a supported model, or correct its entry in sites/registry.py"
                )
            worst = max(worst, error)
    return worst


def _errors(adapter: ModelAdapter, found: dict[tuple[int, str], Tensor], layer: int) -> Iterator[tuple[str, float]]:
    """What may be wrong with a layer, and by how much it is; modules run again only where all before is right."""
    pre, post, attention, mlp, projected, attended, mlp_in, mid = (
        _seen(found, layer, name) for name in ("pre", "post", "attention", "mlp", "projected", "attended", "mlp_in", "mid")
    )
    yield "its output is not its input plus what its attention and MLP add", _error(post, pre, attention, mlp)
    yield "its attention does not end in the projection that attn_out is read from", _error(attended, projected)
    yield "its MLP does not make mlp_out of mlp_in", _error_again(mlp, adapter.mlp_parts(layer), mlp_in)
    yield "the norm before its MLP does not make mlp_in of resid_mid", _error_again(mlp_in, adapter.norm_parts(layer), mid)


def default_tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding explains: 1e-5 for float32 and better, more for the short formats [1].

    A block rounds twice, after each addition, and each time by at most eps / 2 of a sum no longer than two of its terms:
    1.5 eps in all, of which we allow 2 (bfloat16, with its 8 bits: 0.016).
    """
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def _run(model: nn.Module, places: dict[tuple[int, str], HookPoint], vocab_size: int) -> dict[tuple[int, str], Tensor]:
    """The activations at all places, in float64, from one pass over a few scattered token ids."""
    found: dict[tuple[int, str], Tensor] = {}

    def keep(name: tuple[int, str]) -> Visitor:
        def visit(x: Tensor) -> None:
            found[name] = x.double()  # a copy, which nothing that the pass does later changes

        return visit

    device = next(model.parameters()).device
    input_ids = (torch.arange(TOY_BATCH * TOY_CONTEXT, device=device) * 7919 + 11).remainder(vocab_size)
    with visiting([(place, keep(name)) for name, place in places.items()]):
        model(input_ids=input_ids.view(TOY_BATCH, TOY_CONTEXT), use_cache=False)
    return found


def _error_again(made: Tensor, modules: Sequence[nn.Module], x: Tensor) -> float:
    """`_error` of what the modules, one after another, make of `x` in their own format; infinite where they cannot."""
    y = x
    try:
        for module in modules:
            y = module(y.to(next(module.parameters()).dtype))
    except (TypeError, RuntimeError, AttributeError):  # it takes more than this, or another size
        return math.inf
    return _error(made, y.double()) if y.shape == made.shape else math.inf


def _seen(found: dict[tuple[int, str], Tensor], layer: int, name: str) -> Tensor:
    if (layer, name) not in found:
        raise ModelError(f"layer {layer}: the pass did not run the module of {name!r}; correct its entry in sites/registry.py")
    return found[layer, name]


def _error(whole: Tensor, *parts: Tensor) -> float:
    """The worst token's |whole - sum of parts|, relative to the longest of these vectors there.

    Relative to the longest, for a block may cancel a huge residual (at BOS), and what is left is then mostly rounding.
    """
    longest = torch.stack([x.norm(dim=-1) for x in (whole, *parts)]).amax(0)
    difference = (whole - torch.stack(parts).sum(0)).norm(dim=-1)
    return (difference / longest.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
