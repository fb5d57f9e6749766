"""The folder of one SAE or transcoder in SAELens's own format (version 6), which `load_sae` and SAELens read. Torch-free.

SAELens keeps a skip as [d_out, d_in] and computes x @ W_skip.T; ours is its transpose.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.base.files import write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.metadata import SaeMetadata

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The SAELens whose format this is. Without a version from 6 on, its reader drops nested metadata silently."""


SAE, TOP_K, TRANSCODER, SKIP_TRANSCODER = "jumprelu", "topk", "jumprelu_transcoder", "jumprelu_skip_transcoder"
"""SAELens's names of the architectures that are written."""


def write_saelens(folder: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the pair of files, config last: a folder with a config is whole. `tensors` are as `Sae.tensors` gives them."""
    if config["architecture"] == TOP_K:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
    if "W_skip" in tensors:
        tensors = tensors | {"W_skip": tensors["W_skip"].T.contiguous()}
        config = config | {"architecture": SKIP_TRANSCODER}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


def saelens_config(
    d_in: int,
    d_sae: int,
    known: SaeMetadata,
    more: Mapping[str, Any] | None = None,
    *,
    d_out: int | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """What SAELens must know of a folded coder; what we know beyond that, and `more`, goes under `metadata`.

    `d_out` is a transcoder's. ConfigError for a transcoder with `top_k`, which SAELens has no architecture for.
    """
    if top_k is not None and known.is_transcoder:
        raise ConfigError("SAELens has no TopK transcoder; write it in the format of sparsify or of circuit-tracer")
    site = known.site
    outputs: dict[str, Any] = {} if not known.is_transcoder else {"d_out": d_out or d_in}
    hooks: dict[str, Any] = {} if not known.is_transcoder else {"hook_name_out": known.hook_out, "hook_head_index_out": None}
    return {
        "architecture": TRANSCODER if known.is_transcoder else SAE if top_k is None else TOP_K,
        **({} if top_k is None else {"k": top_k, "rescale_acts_by_decoder_norm": False}),
        "d_in": d_in,
        "d_sae": d_sae,
        **outputs,
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
            "hook_name": known.hook_in,
            "hook_head_index": None,
            **hooks,
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
