"""Activations of any set of sites, from one forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from everyscope.base.errors import ModelError
from everyscope.sites.hooks import Visitor, visiting
from everyscope.sites.inputs import Inputs, read_inputs
from everyscope.sites.model import LanguageModel, bare
from everyscope.sites.names import BySite, Site, sites_in
from everyscope.sites.registry import adapter_of

Activations = dict[Site, Float[Tensor, "batch ctx d_in"]]
"""Raw activations by site, in the model's dtype and on its device."""
Mask = Bool[Tensor, "batch ctx"] | Int[Tensor, "batch ctx"]


class _AllCaptured(BaseException):
    """Ends a forward pass that has nothing more to give. No Exception, so that no model's `except Exception` eats it."""


@overload
def capture(
    model: nn.Module | LanguageModel,
    sites: Site | str,
    inputs: Inputs,
    attention_mask: Mask | None = None,
    *,
    tokenizer: Any = None,
) -> Float[Tensor, "batch ctx d_in"]: ...
@overload
def capture(
    model: nn.Module | LanguageModel,
    sites: Iterable[Site | str],
    inputs: Inputs,
    attention_mask: Mask | None = None,
    *,
    tokenizer: Any = None,
) -> BySite[Tensor]: ...
@torch.no_grad()
def capture(
    model: nn.Module | LanguageModel,
    sites: Site | str | Iterable[Site | str],
    inputs: Inputs,
    attention_mask: Mask | None = None,
    *,
    tokenizer: Any = None,
) -> BySite[Tensor] | Tensor:
    """The activations at `sites`, each [batch ctx d_in], from one pass that stops right behind the last of them.

    Of one site or name, as in "resid_post.3" or "blocks.3.hook_resid_post", its activations; of several, a dict by site that is
    found by names too. `inputs` are token ids, [batch ctx] or [ctx], moved to the model's device; what a tokenizer returns; or
    text, tokenised as in training with BOS first (`tokenize`), by the model's own tokenizer unless one is given. ConfigError for
    sites or inputs that are none, or a layer that the model does not have; ModelError for a model that is unknown or that did
    not run a module it should have run.
    """
    wanted, adapter = sites_in(sites), adapter_of(bare(model))
    input_ids, mask = read_inputs(model, inputs, attention_mask, tokenizer)
    model = bare(model)
    found: BySite[Tensor] = BySite()

    def keep(site: Site) -> Visitor:
        def visit(x: Tensor) -> None:
            found[site] = x
            if len(found) == len(wanted):
                raise _AllCaptured

        return visit

    device = next(model.parameters()).device
    mask = None if mask is None else mask.to(device)
    with visiting([(adapter.hook_point(site), keep(site)) for site in wanted]):
        try:
            model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
        except _AllCaptured:
            return found[wanted[0]] if isinstance(sites, Site | str) else BySite((site, found[site]) for site in wanted)
    missing = ", ".join(str(site) for site in wanted if site not in found)
    raise ModelError(f"{type(model).__name__} did not run {missing}; its adapter in sites/registry.py is wrong")


@contextmanager
def capturing(model: nn.Module | LanguageModel, sites: Site | str | Iterable[Site | str]) -> Iterator[BySite[Tensor]]:
    """Yield a dict that every forward pass inside the block refills with the activations at `sites` [batch ctx d_in].

    For callers who need the logits too, or gradients: nothing is detached. Inside a `splice`, it gives what the splice
    put there; around one, what stood there before. Raises as `capture` does.
    """
    adapter = adapter_of(bare(model))
    found: BySite[Tensor] = BySite()

    def keep(site: Site) -> Visitor:
        def visit(x: Tensor) -> None:
            found[site] = x

        return visit

    with visiting([(adapter.hook_point(site), keep(site)) for site in sites_in(sites)]):
        yield found
