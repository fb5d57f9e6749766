"""Llama Scope (arXiv 2410.20526): hyperparams.json beside checkpoints/final.safetensors; SAEs and transcoders, not folded.

With n_in = sqrt(d) / (mean norm of the input) and n_out likewise of the output, theta a scalar and d_i the rows of the decoder:

    pre = n_in x @ E.T + b_enc,   f = pre where pre |d_i| > theta, else 0,   y = (f @ D.T + b_dec) / n_out

so W_enc = n_in E.T, threshold_i = theta / |d_i|, W_dec = D.T / n_out, b_dec / n_out is the same function of raw activations.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import read_object, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.suite.formats.coder import folded, in_units_of_decoder_norms, require_relu
from everyscope.suite.formats.hooks import described, place
from everyscope.suite.formats.weights import read_safetensors, taken

CONFIG_FILE, WEIGHTS_FILE = "hyperparams.json", "checkpoints/final.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
MODELS = {"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B"}
"""Language models by what the folders' names begin with."""


def known(weights: Path) -> SaeMetadata:
    """What the folder of the SAE in `weights` says of it."""
    folder = weights.parents[1]
    config = read_object(folder / CONFIG_FILE)
    model = next((name for prefix, name in MODELS.items() if folder.name.startswith(prefix)), None)
    source, target = (place(str(config.get(f"hook_point_{way}"))) for way in ("in", "out"))
    l0 = config.get("top_k") if config.get("act_fn") == "topk" else None
    return described(
        source, target, model=model, l0=l0, is_transcoder=config.get("hook_point_in") != config.get("hook_point_out")
    )


def read(weights: Path) -> Sae:
    """The SAE or transcoder in `weights`, folded; ConfigError for a normalisation or an activation that cannot be."""
    path = weights.parents[1] / CONFIG_FILE
    config = read_object(path)
    encoder, b_enc, decoder, b_dec = taken(weights, read_safetensors(weights), NAMES, "a Llama Scope file")
    scale_in, scale_out = _scales(path, config, encoder.shape[1])
    if config.get("use_glu_encoder"):
        raise ConfigError(f"{path}: use_glu_encoder is true; an encoder with a gate of its own has no folded form")
    if config.get("apply_decoder_bias_to_pre_encoder") and config.get("use_decoder_bias", True):
        b_enc = (b_enc.double() - encoder.double() @ b_dec.double()).float()
    has_norms = config.get("sparsity_include_decoder_norm", True)
    norms = decoder.double().norm(dim=0) if has_norms else torch.ones(encoder.shape[0], dtype=torch.float64)
    activation = str(config.get("act_fn", "relu")).lower()
    tensors = {
        "W_enc": (encoder.double().T * scale_in).float(),
        "W_dec": (decoder.double().T / scale_out).float(),
        "b_enc": b_enc,
        "b_dec": (b_dec.double() / scale_out).float(),
        "threshold": torch.zeros(encoder.shape[0]),
    }
    if activation == "jumprelu":
        tensors["threshold"] = _thresholds(float(config.get("jump_relu_threshold", 0.0)), norms, tensors)
        return folded(weights, tensors, known(weights))
    if activation == "topk":
        chosen = in_units_of_decoder_norms(tensors) if has_norms else tensors
        return folded(weights, chosen, known(weights), top_k=int(config["top_k"]))
    if activation == "relu":
        return folded(weights, tensors, known(weights))
    raise ConfigError(f"{path}: act_fn={activation!r}; jumprelu, relu and topk can be read")


def _scales(path: Path, config: dict[str, Any], d_model: int) -> tuple[float, float]:
    kind = config.get("norm_activation", "dataset-wise")
    if kind in ("inference", None, "none"):
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    if kind != "dataset-wise":
        raise ConfigError(f"{path}: norm_activation={kind!r} depends on each token; only dataset-wise can be folded into weights")
    try:
        mean_in, mean_out = float(norms["in"]), float(norms["out"])  # pyright: ignore[reportOptionalSubscript]
        return math.sqrt(d_model) / mean_in, math.sqrt(d_model) / mean_out
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise DataError(f'{path}: dataset_average_activation_norm is {norms!r}, expected {{"in": norm, "out": norm}}') from error


def _thresholds(theta: float, norms: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Theta / |d_i|; a latent that writes nothing never passes theta, so it is silenced."""
    silent = norms == 0
    tensors["W_enc"][:, silent], tensors["b_enc"] = 0, tensors["b_enc"].masked_fill(silent, 0)
    return (theta / norms.masked_fill(silent, 1)).float()


def write(folder: Path, coder: Sae) -> None:
    """checkpoints/final.safetensors, then hyperparams.json, with nothing left to normalise.

    The format has one threshold for all latents. Where ours differ, latents are written in units of their thresholds: the same
    reconstructions, from latents of other sizes. ConfigError for a skip, thresholds of which some are 0, or an unknown place.
    """
    known = coder.metadata
    if coder.W_skip is not None or known.hook_in is None or known.hook_out is None:
        raise ConfigError(
            "Llama Scope's format holds no skip, and names the hooks that are read and written; this coder does not fit"
        )
    if coder.top_k is not None:
        require_relu(coder, "a TopK coder of Llama Scope's format")
    tensors, theta = coder.tensors(), coder.threshold.detach().float().cpu()
    if bool((theta != theta[0]).any()):
        if bool((theta == 0).any()):
            raise ConfigError("Llama Scope's format has one threshold for all latents; of these some are 0 and others are not")
        tensors |= {
            "W_enc": tensors["W_enc"] / theta,
            "b_enc": tensors["b_enc"] / theta,
            "W_dec": tensors["W_dec"] * theta[:, None],
        }
        theta = torch.ones_like(theta)
    matrices = {"encoder.weight": tensors["W_enc"].T.contiguous(), "decoder.weight": tensors["W_dec"].T.contiguous()}
    write_tensors(folder / WEIGHTS_FILE, matrices | {"encoder.bias": tensors["b_enc"], "decoder.bias": tensors["b_dec"]})
    config = {
        "hook_point_in": known.hook_in,
        "hook_point_out": known.hook_out,
        "d_model": coder.d_in,
        "d_sae": coder.d_sae,
        "expansion_factor": coder.d_sae / coder.d_in,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu" if coder.top_k is None else "topk",
        "jump_relu_threshold": float(theta[0]),
        "top_k": coder.top_k,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }
    write_json(folder / CONFIG_FILE, config)
