"""Writing one SAE in the formats that others read. Equal tensors give equal bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from everyscope.base.files import whole_file, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import PARAMETERS, Sae
from everyscope.sites.names import Site, SiteKind
from everyscope.suite.layout import CONFIG_FILE, NPZ_FILE, WEIGHTS_FILE

SAELENS_VERSION = "6.54.12"
"""The SAELens whose native format this is. Without a version from 6 on, its reader drops nested metadata silently."""
HOOKS: dict[SiteKind, str] = {
    "attn_out": "blocks.{layer}.attn.hook_z",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "embed": "hook_embed",
}
"""TransformerLens's names of our sites."""
KEPT_METRICS = ("l0", "fvu", "fvu_usual", "fvu_pca", "delta_loss", "loss_recovered", "dead_fraction", "dense_fraction")
"""Scores that go into cfg.json's metadata."""


def write_npz(folder: Path, sae: Sae) -> None:
    """params.npz as in the Gemma Scope release: five float32 arrays, raw activations in, raw reconstruction out.

    numpy stores entries uncompressed and dated 1980, so the bytes depend on the tensors alone.
    """
    tensors = sae.tensors()
    arrays: dict[str, Any] = {name: tensors[name].numpy() for name in PARAMETERS.values()}
    with whole_file(folder / NPZ_FILE) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def write_saelens(folder: Path, sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """cfg.json and sae_weights.safetensors, which SAELens loads unchanged (its version 6 format)."""
    write_tensors(folder / WEIGHTS_FILE, sae.tensors())
    write_json(folder / CONFIG_FILE, saelens_config(sae, site, model, record, metrics))


def saelens_config(sae: Sae, site: Site, model: str, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of a folded SAE; under `metadata` also what we know beyond that."""
    # SAELens flattens [heads, head_dim] only where it is told to.
    reshape = "hook_z" if site.kind == "attn_out" else "none"
    return {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": reshape,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": model,
            "model_class_name": "HookedTransformer",
            "hook_name": HOOKS[site.kind].format(layer=site.layer),
            "hook_head_index": None,
            "context_size": metrics.get("context"),
            "prepend_bos": True,
            "dataset_path": metrics.get("data"),
            "seqpos_slice": [None],
            "exclude_special_tokens": True,
            "model_from_pretrained_kwargs": {},
            "neuronpedia_id": None,
            "training_tokens": record.get("num_tokens"),
            "sparsity_coefficient": record.get("config", {}).get("sparsity_coefficient"),
            "target_l0": record.get("config", {}).get("target_l0"),
            **{name: metrics.get(name) for name in KEPT_METRICS},
        },
    }
