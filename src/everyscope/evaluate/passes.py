"""One batch of an evaluation: a clean forward pass for all SAEs, then one spliced pass for each, from its layer on."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.groups import Groups, moments, part
from everyscope.evaluate.held_out import Batch
from everyscope.evaluate.losses import losses_and_divergences, next_token_losses
from everyscope.evaluate.sums import SaeState, SaeSums
from everyscope.evaluate.targets import Target
from everyscope.evaluate.uniformity import centred_logits
from everyscope.sae.folded import Sae
from everyscope.sites.capture import Activations, capturing
from everyscope.sites.hooks import visiting
from everyscope.sites.names import Site
from everyscope.sites.registry import anatomy_of
from everyscope.sites.splice import resuming, splice

CHUNK_ACTIVATIONS = 1 << 26
"""Latent activations held at once [numbers]; bounds memory at large widths."""


@dataclass(frozen=True)
class Evaluated:
    """What stays the same over all batches: the model, the SAEs, what training rows say of their sites."""

    model: Any
    """A Hugging Face causal language model in eval mode."""
    targets: tuple[Target, ...]
    saes: dict[str, Sae]
    """By the identity of their scores, rounded as the config says, on the model's device."""
    calibrations: dict[Site, Calibration]
    """On the model's device."""

    @property
    def sites(self) -> list[Site]:
        """The sites that have an SAE here, in order."""
        return sorted({target.site for target in self.targets})


@dataclass(frozen=True)
class Clean:
    """What the untouched model gives on one batch, detached."""

    logits: Float[Tensor, "batch ctx vocab"]
    activations: Activations
    """Of the sites that were asked for, and of what spliced passes start from."""
    gradients: Activations
    """Of the logits' sum in uniformity.py by the activations; empty unless it was asked for."""


def captured(sites: list[Site]) -> list[Site]:
    """The sites and, for those inside a block, the residual stream that enters it."""
    return sorted(set(sites) | {below for site in sites if (below := _entering(site)) is not None})


def _entering(site: Site) -> Site | None:
    """The residual site whose activations suffice to start just before `site`; None where the embedding is needed."""
    return Site("resid_post", site.layer - 1) if site.kind in ("attn_out", "mlp_out") and site.layer > 0 else None


def clean_pass(model: Any, sites: list[Site], batch: Batch, with_gradients: bool = False) -> Clean:
    """One forward pass; `with_gradients`, one backward pass on its graph gives the gradients at all sites."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()  # weights are frozen: the graph starts where the first block begins

    with torch.set_grad_enabled(with_gradients), ExitStack() as stack:
        if with_gradients:
            stack.enter_context(visiting([(anatomy_of(model).place(Site("embed", 0)), leaf)]))
        activations = stack.enter_context(capturing(model, captured(sites)))
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        gradients: Activations = {}
        if with_gradients:
            goal = centred_logits(logits.to(batch.mask.device), batch.input_ids, batch.mask)
            gradients = dict(zip(sites, torch.autograd.grad(goal, [activations[site] for site in sites]), strict=True))
    # Of a model spread over devices everything comes to one, that of the SAEs.
    home = batch.mask.device
    found = {site: x.detach().to(home) for site, x in activations.items()}
    return Clean(logits.detach().to(home), found, {site: gradient.to(home) for site, gradient in gradients.items()})


@torch.no_grad()
def measure_batch(evaluated: Evaluated, state: SaeState, batch: Batch, with_gradients: bool, passed: Callable[[], None]) -> None:
    """Add one batch to `state`. Masked positions keep their clean activations in every pass; `passed` is called after each."""
    clean = clean_pass(evaluated.model, evaluated.sites, batch, with_gradients)
    losses, loss_groups = next_token_losses(clean.logits, batch.input_ids, batch.mask), batch.loss_groups
    state.clean.add(loss_groups, torch.stack([torch.ones_like(losses), losses], dim=1))
    passed()
    for site in evaluated.sites:
        rows, calibration = clean.activations[site][batch.mask], evaluated.calibrations[site]
        is_large = rows.double().norm(dim=1) > calibration.norm_threshold
        groups = {**batch.row_groups, "norm": is_large.long()}
        step = max(1, CHUNK_ACTIVATIONS // rows.shape[-1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            state.sites[site].add(part(groups, some), moments(rows[some], calibration.mean))
        gradient = clean.gradients[site][batch.mask] if with_gradients else None
        for target in (target for target in evaluated.targets if target.site == site):
            sums = state.saes[target.identity]
            x_hat = reconstruct(evaluated.saes[target.identity], rows, groups, sums, gradient)
            logits = spliced_logits(evaluated.model, batch.input_ids, site, x_hat, batch.mask, clean.activations)
            measured = losses_and_divergences(logits, clean.logits, batch.input_ids, batch.mask, f"{target.place} spliced in")
            sums.losses.add(loss_groups, torch.stack(measured, dim=1))
            passed()


def reconstruct(
    sae: Sae, rows: Float[Tensor, "n d_in"], groups: Groups, sums: SaeSums, gradient: Float[Tensor, "n d_in"] | None = None
) -> Float[Tensor, "n d_in"]:
    """The reconstruction of unmasked rows, a chunk at a time, each chunk added to `sums`."""
    chunk = max(1, CHUNK_ACTIVATIONS // sae.d_sae)
    reconstructions = []
    for start in range(0, len(rows), chunk):
        some = slice(start, start + chunk)
        f = sae.encode(rows[some])
        x_hat = sae.decode(f)
        measures = sums.reconstruction.update(rows[some], x_hat, f)
        sums.rows.add(part(groups, some), torch.stack([measures.errors, measures.cosines, measures.firings], dim=1))
        if gradient is not None:
            sums.uniformity.update(f, gradient[some], sae.w_dec)
        reconstructions.append(x_hat)
    return torch.cat(reconstructions) if reconstructions else rows.float()


def spliced_logits(
    model: Any,
    input_ids: Int[Tensor, "batch ctx"],
    site: Site,
    rows: Float[Tensor, "n d_in"],
    mask: Bool[Tensor, "batch ctx"],
    activations: Activations,
) -> Float[Tensor, "batch ctx vocab"]:
    """The logits with `rows` at the unmasked positions of `site`. Only what lies above the site is computed.

    `activations` are those of the clean pass: the site's own, and of the residual stream that enters its block.
    """
    spliced = activations[site].clone()
    spliced[mask] = rows.to(spliced.dtype)
    with ExitStack() as stack:
        if site.kind == "resid_post":
            stack.enter_context(resuming(model, site.layer, spliced))
        else:
            below = _entering(site)
            if below is not None:
                stack.enter_context(resuming(model, below.layer, activations[below]))
            stack.enter_context(splice(model, {site: lambda _: spliced}, mask=mask))
        return model(input_ids=input_ids, use_cache=False).logits
