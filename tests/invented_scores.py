"""Invented trained SAEs and scores, quick to make: publishing reads numbers and tensors, and runs no model."""

import torch
from small_scope import random_sae

from everyscope.evaluate.scores import write_scores
from everyscope.publish.config import PublishConfig
from everyscope.sae.files import save_sae
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.names import Site

SITES = tuple(Site(kind, layer) for kind in ("attn_out", "mlp_out", "resid_post") for layer in range(2))


def add_sae(config: PublishConfig, site: Site, name: str, width: int, threshold: float) -> dict:
    """A random SAE with the scores of random rows; gives its metrics."""
    sae = random_sae(6, width, threshold, torch.zeros(6), seed=width)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(site.layer))
    sums = ReconstructionSums.start(torch.zeros(6), width)
    sums.update(x, sae(x), sae.encode(x))
    metrics = {
        "site": site.kind,
        "layer": site.layer,
        "d_in": 6,
        "width": width,
        "l0": sums.l0,
        "fvu": sums.fvu,
        "fvu_pca": 0.9,
        "delta_loss": 0.1 * sums.fvu,
        "loss_recovered": 1 - 0.1 * sums.fvu,
        "dead_fraction": sums.dead_fraction,
        "dense_fraction": sums.dense_fraction,
        "num_tokens": 400,
        "num_sequences": 20,
        "context": 24,
        "loss_clean": 2.5,
        "data": "invented rows <&>, held-out documents",
        "mask": "BOS, EOS, padding and prefix excluded",
        "evaluation": "0",
    }
    write_scores(config.scores / site.folder / name, metrics, sums)
    save_sae(config.trained / site.folder / name, sae, {"num_tokens": 1000, "config": {"sparsity_coefficient": 0.1}})
    return metrics
