"""Writing one SAE in the formats that others read. Equal tensors give equal bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from everyscope.base.files import whole_file
from everyscope.sae import saelens
from everyscope.sae.folded import PARAMETERS, Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.layout import NPZ_FILE

KEPT_METRICS = ("l0", "fvu", "fvu_usual", "fvu_pca", "delta_loss", "loss_recovered", "dead_fraction", "dense_fraction")
"""Scores that go into cfg.json's metadata."""


def write_npz(folder: Path, sae: Sae) -> None:
    """params.npz as in the Gemma Scope release: five float32 arrays, raw activations in, raw reconstruction out.

    numpy stores entries uncompressed and dated 1980, so the bytes depend on the tensors alone.
    """
    tensors = sae.tensors()
    arrays: dict[str, Any] = {name: tensors[name].numpy() for name in PARAMETERS}
    with whole_file(folder / NPZ_FILE) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def write_saelens(folder: Path, sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """cfg.json and sae_weights.safetensors, which SAELens loads unchanged (its version 6 format)."""
    saelens.write_saelens(folder, sae.tensors(), saelens_config(sae, site, model, record, metrics))


def saelens_config(sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of a folded SAE; under `metadata` also how it was trained and what it scored."""
    known = SaeMetadata(site, model, metrics.get("l0"), record.get("scale"), record.get("num_tokens"))
    trained = record.get("config", {})
    more = {
        "context_size": metrics.get("context"),
        "dataset_path": metrics.get("data"),
        **{name: trained.get(name) for name in ("sparsity_coefficient", "target_l0")},
        **{name: metrics.get(name) for name in KEPT_METRICS},
    }
    return saelens.saelens_config(sae.d_in, sae.d_sae, known, more)
