"""One batch of an evaluation: a clean forward pass for all SAEs, then one spliced pass for each, from its layer on."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.base.errors import ShapeMismatch
from everyscope.evaluate.losses import next_token_losses
from everyscope.evaluate.pca import Pca
from everyscope.evaluate.sums import EvaluationSums
from everyscope.evaluate.targets import Target
from everyscope.sae.folded import Sae
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.capture import capturing
from everyscope.sites.names import Site
from everyscope.sites.splice import resuming, splice

CHUNK_ACTIVATIONS = 1 << 26
"""Latent activations held at once [numbers]; bounds memory at large widths."""


@dataclass(frozen=True)
class Evaluated:
    """What stays the same over all batches: the model, the SAEs, the baselines."""

    model: Any
    """A Hugging Face causal language model in eval mode."""
    targets: tuple[Target, ...]
    saes: dict[str, Sae]
    """By the identity of their scores, float32, on the model's device."""
    means: dict[Site, Float[Tensor, " d_in"]]
    """Mean of the training rows of each site, on the model's device."""
    pcas: dict[Site, Pca]

    @property
    def sites(self) -> list[Site]:
        """The sites that have an SAE here, in order."""
        return sorted({target.site for target in self.targets})

    @property
    def captured(self) -> list[Site]:
        """Those sites and, for the ones inside a block, the residual stream that enters it."""
        return sorted(set(self.sites) | {below for site in self.sites if (below := _entering(site)) is not None})

    @property
    def passes_per_batch(self) -> int:
        """Forward passes a batch takes: one clean, one per SAE, two ablations per site."""
        return 1 + len(self.targets) + 2 * len(self.sites)


def _entering(site: Site) -> Site | None:
    """The residual site whose activations suffice to start just before `site`; None where the embedding is needed."""
    return Site("resid_post", site.layer - 1) if site.kind in ("attn_out", "mlp_out") and site.layer > 0 else None


def measure_batch(
    evaluated: Evaluated,
    sums: EvaluationSums,
    input_ids: Int[Tensor, "batch ctx"],
    mask: Bool[Tensor, "batch ctx"],
    passed: Callable[[], None],
) -> None:
    """Add one batch to `sums`. Masked positions keep their clean activations in every pass; `passed` is called after each."""
    model = evaluated.model
    with torch.no_grad():
        with capturing(model, evaluated.captured) as activations:
            logits = model(input_ids=input_ids, use_cache=False).logits
        sums.clean.update(next_token_losses(logits, input_ids, mask))
        del logits
        passed()

        def losses_with(site: Site, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, " m"]:
            logits = spliced_logits(model, input_ids, site, rows, mask, activations)
            passed()
            return next_token_losses(logits, input_ids, mask)

        for site in evaluated.sites:
            rows, site_sums, mean = activations[site][mask], sums.sites[site], evaluated.means[site]
            if rows.shape[-1] != len(mean):
                raise ShapeMismatch(
                    f"{site}: the model gives d_in={rows.shape[-1]}, the shards {len(mean)}; are they of another model?"
                )
            site_sums.pca.update(rows, evaluated.pcas[site])
            site_sums.zero_ablated.update(losses_with(site, torch.zeros_like(rows)))
            site_sums.mean_ablated.update(losses_with(site, mean.to(rows.dtype).expand_as(rows)))
            for target in evaluated.targets:
                if target.site == site:
                    sae_sums = sums.saes[target.identity]
                    x_hat = reconstruct(evaluated.saes[target.identity], rows, sae_sums.reconstruction)
                    sae_sums.spliced.update(losses_with(site, x_hat))
    sums.batches += 1
    sums.sequences += len(input_ids)


def reconstruct(sae: Sae, rows: Float[Tensor, "n d_in"], sums: ReconstructionSums) -> Float[Tensor, "n d_in"]:
    """The reconstruction of unmasked rows in float32, a chunk at a time, each chunk added to `sums`."""
    chunk = max(1, CHUNK_ACTIVATIONS // sae.d_sae)
    reconstructions = []
    for start in range(0, len(rows), chunk):
        x = rows[start : start + chunk]
        f = sae.encode(x)
        x_hat = sae.decode(f)
        sums.update(x, x_hat, f)
        reconstructions.append(x_hat)
    return torch.cat(reconstructions) if reconstructions else rows.float()


def spliced_logits(
    model: Any,
    input_ids: Int[Tensor, "batch ctx"],
    site: Site,
    rows: Float[Tensor, "n d_in"],
    mask: Bool[Tensor, "batch ctx"],
    activations: dict[Site, Float[Tensor, "batch ctx d_in"]],
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
