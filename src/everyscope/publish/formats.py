"""What a suite says of one SAE in SAELens' cfg.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from everyscope.sae import saelens
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site

KEPT_METRICS = ("l0", "fvu", "fvu_usual", "fvu_pca", "delta_loss", "loss_recovered", "dead_fraction", "dense_fraction")
"""Scores that go into cfg.json's metadata."""


def write_saelens(folder: Path, sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """cfg.json and sae_weights.safetensors, which SAELens loads unchanged (its version 6 format)."""
    saelens.write_saelens(folder, sae.tensors(), published_saelens_config(sae, site, model, record, metrics))


def published_saelens_config(sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of a folded SAE; under `metadata` also how it was trained and what it scored."""
    known = replace(
        sae.metadata,
        site=sae.metadata.site if sae.is_transcoder else site,
        model=model,
        l0=metrics.get("l0"),
        scale=record.get("scale"),
        num_tokens=record.get("num_tokens"),
    )
    trained = record.get("config", {})
    more = {
        "context_size": metrics.get("context"),
        "dataset_path": metrics.get("data"),
        **{name: trained.get(name) for name in ("sparsity_coefficient", "target_l0")},
        **{name: metrics.get(name) for name in KEPT_METRICS},
    }
    return saelens.saelens_config(sae.d_in, sae.d_sae, known, more, d_out=sae.d_out)
