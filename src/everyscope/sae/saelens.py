"""The folder of one SAE in SAELens's own format (version 6), which `load_sae` and SAELens read. Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.base.files import write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The SAELens whose format this is. Without a version from 6 on, its reader drops nested metadata silently."""


def write_saelens(folder: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the pair of files, config last: a folder with a config is whole."""
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


def saelens_config(d_in: int, d_sae: int, known: SaeMetadata, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What SAELens must know of a folded SAE; what we know beyond that, and `more`, goes under `metadata`."""
    site = known.site
    return {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        # SAELens flattens [heads, head_dim] only where its config says so.
        "reshape_activations": "hook_z" if site is not None and site.kind == "attn_out" else "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": known.model,
            "model_class_name": "HookedTransformer",
            "hook_name": None if site is None else site.hook_name,
            "hook_head_index": None,
            "context_size": None,
            "prepend_bos": True,
            "dataset_path": None,
            "seqpos_slice": [None],
            "exclude_special_tokens": True,
            "model_from_pretrained_kwargs": {},
            "neuronpedia_id": None,
            "training_tokens": known.num_tokens,
            "scale": known.scale,
            "l0": known.l0,
            **(more or {}),
        },
    }


def metadata_of(config: Mapping[str, Any]) -> SaeMetadata:
    """What a cfg.json of ours or of SAELens says; before version 6 its fields were not nested."""
    said: dict[str, Any] = {**config, **(config.get("metadata") or {})}
    try:
        site = Site.parse(str(said.get("hook_name")))
    except ConfigError:  # a hook where we have no site
        site = None
    return SaeMetadata(site, said.get("model_name"), said.get("l0"), said.get("scale"), said.get("training_tokens"))
