"""Activations of any set of sites, from one forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.hooks import Visitor, visiting
from everyscope.sites.names import Site
from everyscope.sites.registry import anatomy_of

Activations = dict[Site, Float[Tensor, "batch ctx d_in"]]
"""Raw activations by site, in the model's dtype and on its device."""


class _AllCaptured(BaseException):
    """Ends a forward pass that has nothing more to give. No Exception, so that no model's `except Exception` eats it."""


@torch.no_grad()
def capture(
    model: nn.Module,
    sites: Iterable[Site],
    input_ids: Int[Tensor, "batch ctx"],
    attention_mask: Bool[Tensor, "batch ctx"] | Int[Tensor, "batch ctx"] | None = None,
) -> Activations:
    """The activations at `sites`, each [batch ctx d_in], from one pass that stops right behind the last of them.

    The ids are moved to the model's device. ConfigError for no sites or a layer that the model does not have; ModelError
    for a model that is unknown or that did not run a module it should have run.
    """
    wanted = tuple(dict.fromkeys(sites))
    if not wanted:
        raise ConfigError("no sites to capture; name at least one, as in Site('resid_post', 0)")
    anatomy = anatomy_of(model)
    found: Activations = {}

    def keep(site: Site) -> Visitor:
        def visit(x: Tensor) -> None:
            found[site] = x
            if len(found) == len(wanted):
                raise _AllCaptured

        return visit

    device = next(model.parameters()).device
    mask = None if attention_mask is None else attention_mask.to(device)
    with visiting([(anatomy.place(site), keep(site)) for site in wanted]):
        try:
            model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
        except _AllCaptured:
            return {site: found[site] for site in wanted}
    missing = ", ".join(str(site) for site in wanted if site not in found)
    raise ModelError(f"{type(model).__name__} did not run {missing}; its anatomy in sites/registry.py is wrong")


@contextmanager
def capturing(model: nn.Module, sites: Iterable[Site]) -> Iterator[Activations]:
    """Yield a dict that every forward pass inside the block fills anew with the activations at `sites` [batch ctx d_in].

    For callers who need the logits too, or gradients: nothing is detached. Inside a `splice`, it gives what the splice
    put there; around one, what was there before. Raises as `capture` does.
    """
    anatomy = anatomy_of(model)
    found: Activations = {}

    def keep(site: Site) -> Visitor:
        def visit(x: Tensor) -> None:
            found[site] = x

        return visit

    with visiting([(anatomy.place(site), keep(site)) for site in dict.fromkeys(sites)]):
        yield found
