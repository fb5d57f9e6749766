"""One batch of an evaluation: a clean forward pass for all SAEs, then one spliced pass for each, from its layer on."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.groups import Groups, Tables, moments, part
from everyscope.evaluate.held_out import Batch
from everyscope.evaluate.linear import usual_pairs
from everyscope.evaluate.losses import Predictions, losses_and_divergences, next_token_losses
from everyscope.evaluate.sums import SaeState, SaeSums
from everyscope.evaluate.targets import EvaluateTarget
from everyscope.evaluate.uniformity import centred_logits
from everyscope.sae.folded import Sae
from everyscope.sae.metrics import RowMeasures
from everyscope.sae.normalisation import is_massive
from everyscope.sites.capture import Activations, capturing
from everyscope.sites.hooks import visiting
from everyscope.sites.names import Site, places_of
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import resuming, splice

CHUNK_ACTIVATIONS = 1 << 26
"""Latent activations held at once [numbers]; bounds memory at large widths."""


@dataclass(frozen=True)
class Evaluated:
    """What stays the same over all batches: the model, the SAEs, what training rows say of their sites."""

    model: Any
    """A Hugging Face causal language model in eval mode."""
    targets: tuple[EvaluateTarget, ...]
    saes: dict[str, Sae]
    """By the identity of their scores, rounded as the config says, on the model's device."""
    calibrations: dict[Site, Calibration]
    """Of every place that is read or written, on the model's device."""
    baseline_blocks: int
    """Blocks, from the first on, in which ablations are spliced too [blocks]."""

    @property
    def sites(self) -> list[Site]:
        """The sites that have an SAE here, in order."""
        return sorted({target.site for target in self.targets})

    def calibration(self, site: Site) -> Calibration:
        """Of what coders at `site` write."""
        return self.calibrations[site.outputs[0]]


@dataclass(frozen=True)
class Clean:
    """What the untouched model gives on one batch, detached."""

    logits: Float[Tensor, "batch ctx vocab"]
    activations: Activations
    """Of the sites that were asked for, and of what spliced passes start from."""
    gradients: Activations
    """Of the logits' sum in uniformity.py by what each site writes; empty unless it was asked for."""


def captured(sites: list[Site]) -> list[Site]:
    """The places of the sites and, for those inside a block, the residual stream that enters it."""
    return sorted({*places_of(sites), *(below for site in sites if (below := _entering(site)) is not None)})


def _entering(site: Site) -> Site | None:
    """The residual site whose activations suffice to start just before `site`; None where the embedding is needed."""
    return Site("resid_post", site.layer - 1) if site.kind not in ("resid_post", "embed") and site.layer > 0 else None


def clean_pass(model: Any, sites: list[Site], batch: Batch, with_gradients: bool = False) -> Clean:
    """One forward pass; `with_gradients`, one backward pass on its graph gives the gradients at all sites."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()  # weights are frozen: the graph starts where the first block begins

    with torch.set_grad_enabled(with_gradients), ExitStack() as stack:
        if with_gradients:
            stack.enter_context(visiting([(adapter_of(model).hook_point(Site("embed", 0)), leaf)]))
        activations = stack.enter_context(capturing(model, captured(sites)))
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        gradients: Activations = {}
        if with_gradients:
            goal = centred_logits(logits.to(batch.mask.device), batch.input_ids, batch.mask)
            places = list(dict.fromkeys(site.outputs[0] for site in sites))
            by_place = dict(zip(places, torch.autograd.grad(goal, [activations[place] for place in places]), strict=True))
            gradients = {site: by_place[site.outputs[0]] for site in sites}
    # Of a model spread over devices everything comes to one, that of the SAEs.
    home = batch.mask.device
    found = {site: x.detach().to(home) for site, x in activations.items()}
    return Clean(logits.detach().to(home), found, {site: gradient.to(home) for site, gradient in gradients.items()})


@torch.no_grad()
def measure_batch(evaluated: Evaluated, state: SaeState, batch: Batch, with_gradients: bool, num_done: int) -> Iterator[None]:
    """Add one batch to `state`, in steps that may be kept one by one: the clean pass, then each SAE's. The first `num_done` SAEs
    of the batch, and what comes before them, are in it already. Masked and massive positions keep their clean activations.
    """
    clean = clean_pass(evaluated.model, evaluated.sites, batch, with_gradients)
    losses, loss_groups = next_token_losses(clean.logits, batch.input_ids, batch.mask), batch.loss_groups
    in_head, predictions = batch.block_of_loss < evaluated.baseline_blocks, Predictions.of(clean.logits)
    head_groups = part(loss_groups, in_head)
    yield
    row_groups, number = batch.row_groups, 0
    for site in evaluated.sites:
        calibration, here = evaluated.calibration(site), rows_at(site, clean.activations, batch, evaluated.calibrations)
        groups, massive_groups = part(row_groups, here.is_usual), part(row_groups, ~here.is_usual)
        gradient = clean.gradients[site][here.mask] if with_gradients else None
        for place, target in enumerate(target for target in evaluated.targets if target.site == site):
            number += 1
            if number <= num_done:
                continue
            if number == 1:
                state.clean.add(loss_groups, torch.stack([torch.ones_like(losses), losses], dim=1))
                state.head.add(head_groups, torch.stack([torch.ones_like(losses), losses], dim=1)[in_head])
            if place == 0:
                _add_moments(state.sites[site], groups, here.usual, calibration.mean)
                _add_moments(state.massive[site], massive_groups, here.massive, calibration.mean)
            sae, sums = evaluated.saes[target.identity], state.saes[target.identity]
            x_hat = reconstruct(sae, here.usual, groups, sums, gradient, here.read)
            measure_massive(sae, here.massive, massive_groups, sums, here.read_massive)
            logits = spliced_logits(evaluated.model, batch.input_ids, site, x_hat, here.mask, clean.activations)
            measured = losses_and_divergences(logits, predictions, batch.input_ids, batch.mask, f"{target.place} spliced in")
            sums.losses.add(loss_groups, torch.stack(measured, dim=1))
            sums.head.add(head_groups, measured[0][in_head, None])
            yield


@dataclass(frozen=True)
class SiteRows:
    """The unmasked activations of one site in one batch, divided."""

    usual: Float[Tensor, "n d_out"]
    """What is to be reconstructed."""
    massive: Float[Tensor, "m d_out"]
    is_usual: Bool[Tensor, " rows"]
    """Of unmasked rows, in order."""
    mask: Bool[Tensor, "batch ctx"]
    """True at usual positions: those that are spliced."""
    read: Float[Tensor, "n d_in"]
    """What coders read at the usual rows: of an SAE, `usual` itself."""
    read_massive: Float[Tensor, "m d_in"]
    """The same at massive ones."""


def site_rows(activations: Float[Tensor, "batch ctx d_in"], batch: Batch, norm_limit: float) -> SiteRows:
    """The rows of a batch, massive ones apart."""
    rows = activations[batch.mask]
    return _divided(rows, rows, ~is_massive(rows, norm_limit), batch)


def rows_at(site: Site, activations: Activations, batch: Batch, calibrations: dict[Site, Calibration]) -> SiteRows:
    """The same of a site that may write another place than it reads; there, what is massive in either is so."""
    reads, writes = site.inputs[0], site.outputs[0]
    if reads == writes:
        return site_rows(activations[site], batch, float(calibrations[site].norm_limit))
    rows, written = activations[reads][batch.mask], activations[writes][batch.mask]
    return _divided(rows, written, usual_pairs(rows, written, calibrations[reads], calibrations[writes]), batch)


def _divided(
    read: Float[Tensor, "rows d_in"], written: Float[Tensor, "rows d_out"], is_usual: Bool[Tensor, " rows"], batch: Batch
) -> SiteRows:
    mask = batch.mask.clone()
    mask[batch.mask] = is_usual
    return SiteRows(written[is_usual], written[~is_usual], is_usual, mask, read[is_usual], read[~is_usual])


def reconstruct(
    sae: Sae,
    rows: Float[Tensor, "n d_out"],
    groups: Groups,
    sums: SaeSums,
    gradient: Float[Tensor, "n d_out"] | None = None,
    read: Float[Tensor, "n d_in"] | None = None,
) -> Float[Tensor, "n d_out"]:
    """The reconstruction of usual rows from what is `read` there (None: themselves), a chunk at a time, each added to `sums`."""
    reconstructions = []
    for some, x_hat, f in _reconstructed(sae, rows if read is None else read):
        measures = sums.reconstruction.update(rows[some], x_hat, f)
        sums.rows.add(part(groups, some), _columns(measures))
        if gradient is not None:
            sums.uniformity.update(f, gradient[some], sae.W_dec)
        reconstructions.append(x_hat)
    return torch.cat(reconstructions) if reconstructions else rows.float()


def measure_massive(
    sae: Sae, rows: Float[Tensor, "n d_out"], groups: Groups, sums: SaeSums, read: Float[Tensor, "n d_in"]
) -> None:
    """Add massive rows, which nothing but plain FVU counts."""
    for some, x_hat, f in _reconstructed(sae, read):
        sums.massive_rows.add(part(groups, some), _columns(sums.massive.update(rows[some], x_hat, f)))


def _reconstructed(
    sae: Sae, rows: Float[Tensor, "n d_in"]
) -> Iterator[tuple[slice, Float[Tensor, "chunk d_out"], Float[Tensor, "chunk d_sae"]]]:
    """A chunk of the rows at a time: which, their reconstructions and their latents."""
    chunk = max(1, CHUNK_ACTIVATIONS // sae.d_sae)
    for start in range(0, len(rows), chunk):
        some = slice(start, start + chunk)
        f = sae.encode(rows[some])
        yield some, sae.decode(f, rows[some]), f


def _add_moments(tables: Tables, groups: Groups, rows: Float[Tensor, "n d_in"], reference: Float[Tensor, " d_in"]) -> None:
    step = max(1, CHUNK_ACTIVATIONS // rows.shape[-1])
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        tables.add(part(groups, some), moments(rows[some], reference))


def _columns(measures: RowMeasures) -> Float[Tensor, "rows 3"]:
    return torch.stack([measures.errors, measures.cosines, measures.firings], dim=1)


def spliced_logits(
    model: Any,
    input_ids: Int[Tensor, "batch ctx"],
    site: Site,
    rows: Float[Tensor, "n d_in"],
    mask: Bool[Tensor, "batch ctx"],
    activations: Activations,
) -> Float[Tensor, "batch ctx vocab"]:
    """The logits with `rows` where `site` writes and `mask` is True. Only what lies above the site is computed.

    `activations` are those of the clean pass: the site's own, and of the residual stream that enters its block. What a transcoder
    reads there is what it reads in the spliced pass too, for all below is as it was.
    """
    site = site.outputs[0]
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
