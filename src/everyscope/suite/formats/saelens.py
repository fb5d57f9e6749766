"""SAELens: cfg.json and sae_weights.safetensors; four kinds of SAEs, and the four architectures of transcoders that it loads.

    f = activation((x [- b_dec]) @ W_enc + b_enc),   y = f @ W_dec + b_dec [+ x @ W_skip.T]

Transcoders subtract nothing. W_skip is [d_out, d_in]: transposed against ours. `sae.saelens` writes the format, for `Sae.save`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import read_object
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.saelens import CONFIG_FILE
from everyscope.suite.formats.coder import folded, gated, in_units_of_decoder_norms, without_subtraction
from everyscope.suite.formats.gemma_scope import UNFOLDED, require_folded
from everyscope.suite.formats.hooks import HookLocation, described, module_place, place
from everyscope.suite.formats.weights import read_safetensors, taken

SAES = ("standard", "gated", "jumprelu", "topk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SIZES = {"d_in": "W_enc", "d_sae": "b_enc", "d_out": "b_dec"}
"""Sizes in cfg.json, and the tensor whose first they are."""


def known(weights: Path) -> SaeMetadata:
    """What cfg.json says; before version 6 its fields were not nested."""
    config = read_object(weights.parent / CONFIG_FILE)
    metadata: dict[str, Any] = {**config, **(config.get("metadata") or {})}
    reads = _place(metadata, "hook_name", "hf_hook_name")
    is_transcoder = _architecture(config) in TRANSCODERS
    writes = _place(metadata, "hook_name_out", "hf_hook_name_out") if is_transcoder else reads
    known = {"model": metadata.get("model_name"), "l0": metadata.get("l0"), "num_tokens": metadata.get("training_tokens")}
    return replace(described(reads, writes, **known, is_transcoder=is_transcoder), scale=metadata.get("scale"))


def _place(metadata: Mapping[str, Any], hook: str, module: str) -> HookLocation:
    """The place that a hook names; a module's name goes first, for SAELens calls the MLP's input hook_mlp_in, whatever it is."""
    by_module = module_place(str(metadata.get(module)))
    return by_module if by_module[1] is not None else place(str(metadata.get(hook)))


def read(weights: Path) -> Sae:
    """The SAE or transcoder in a folder, folded: b_dec that is subtracted from the input goes into b_enc.

    ConfigError for another architecture, or activations that must be normalised first; ShapeMismatch where weights are not of the
    sizes in cfg.json.
    """
    path = weights.parent / CONFIG_FILE
    config, metadata, found = read_object(path), known(weights), read_safetensors(weights)
    architecture, normalised = _architecture(config), config.get("normalize_activations") or "none"
    if architecture not in (*SAES, *TRANSCODERS) or normalised != "none":
        raise ConfigError(
            f"{path}: architecture={architecture!r}, normalize_activations={normalised!r}; only "
            f"{', '.join((*SAES, *TRANSCODERS))} with none can be read, fold the normalisation in first"
        )
    _check_factors(weights, found, architecture)
    _check_sizes(weights, config, found)
    tensors = _tensors(weights, found, architecture)
    if architecture in TRANSCODERS:
        if config.get("apply_b_dec_to_input"):
            raise ConfigError(f"{path}: apply_b_dec_to_input is true, but b_dec of a transcoder is no input; set it to false")
        return folded(weights, tensors, metadata)
    if config.get("apply_b_dec_to_input", True):  # SAELens itself takes a missing flag for true
        tensors = without_subtraction(tensors)
    if architecture != "topk":
        return folded(weights, tensors, metadata)
    if config.get("rescale_acts_by_decoder_norm"):
        tensors = in_units_of_decoder_norms(tensors)
    return folded(weights, tensors, metadata, top_k=_k(path, config))


def _architecture(config: Mapping[str, Any]) -> str:
    """The architecture; before version 6 a TopK SAE was a standard one of another activation."""
    architecture = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if architecture == "standard" and activation != "relu":
        return "topk" if activation == "topk" else f"standard with {activation}"
    return architecture


def _k(path: Path, config: Mapping[str, Any]) -> int:
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"{path}: k={k!r}, expected a whole number of latents")
    return k


def _check_factors(weights: Path, found: Mapping[str, Tensor], architecture: str) -> None:
    has_skip = "skip" in architecture
    for name, tensor in found.items():
        if any(word in name.lower() for word in UNFOLDED) and not (has_skip and name == "W_skip"):
            require_folded(weights, name, tensor.float().numpy())


def _check_sizes(weights: Path, config: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    for field, name in SIZES.items():
        if (
            name in found
            and found[name].ndim
            and (want := config.get(field, found[name].shape[0])) != (got := found[name].shape[0])
        ):
            raise ShapeMismatch(f"{weights}: has {field}={got}, {CONFIG_FILE} says {want!r}; are they of two SAEs? download both")


def _tensors(weights: Path, found: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    form = f"a {architecture} of SAELens"
    if architecture == "gated":
        return gated(*taken(weights, found, ("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag"), form))
    names: tuple[str, ...] = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors: dict[str, Tensor] = dict(zip(names, taken(weights, found, names, form), strict=True))
    if "jumprelu" not in architecture:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    elif "log_threshold" in found:  # checkpoints of training before 6.5x
        tensors["threshold"] = taken(weights, found, ("log_threshold",), form)[0].exp()
    else:
        tensors["threshold"] = taken(weights, found, ("threshold",), form)[0]
    if "skip" in architecture:
        tensors["W_skip"] = taken(weights, found, ("W_skip",), form)[0].T
    return tensors
