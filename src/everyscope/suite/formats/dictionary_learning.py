"""dictionary_learning: config.json and ae.pt; SAEs of seven classes, of which each has its own names and activation.

AutoEncoder and AutoEncoderNew are ReLU, JumpReluAutoEncoder is JumpReLU, BatchTopKSAE and MatryoshkaBatchTopKSAE keep one
threshold for use, AutoEncoderTopK takes the k largest, GatedAutoEncoder is JumpReLU in disguise (`coder.gated`):

    u = (x - b) @ encoder.weight.T + encoder.bias,   f = activation(u),   x_hat = f @ decoder.weight.T + b
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import read_object, write_json
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site, SiteKind
from everyscope.suite.formats.coder import folded, gated, require_relu, require_sae, with_subtraction, without_subtraction
from everyscope.suite.formats.hooks import NOWHERE, HookLocation, described
from everyscope.suite.formats.weights import read_torch, taken, write_torch

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
SUBMODULES: dict[str, SiteKind] = {"resid_post": "resid_post", "mlp_out": "mlp_out"}
Tensors = dict[str, Tensor]


def known(weights: Path) -> SaeMetadata:
    """What config.json says; ConfigError for a class that is none of those listed here."""
    trainer = _trainer(weights)
    name, layer = str(trainer.get("submodule_name")), trainer.get("layer")
    found = re.fullmatch(r"([a-z_]+?)(?:_layer_(\d+))?", name)
    kind = SUBMODULES.get(found[1]) if found else None
    at: HookLocation = NOWHERE
    if found and kind and (found[2] or isinstance(layer, int)):
        at = Site(kind, int(found[2] or layer)), None  # pyright: ignore[reportArgumentType]
    return described(at, at, model=trainer.get("lm_name"), l0=trainer.get("k"))


def _trainer(weights: Path) -> dict[str, Any]:
    path = weights.parent / CONFIG_FILE
    trainer = read_object(path).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in READERS:
        got = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise ConfigError(f"{path}: trainer.dict_class is {got!r}; {', '.join(READERS)} can be read")
    return trainer


def read(weights: Path) -> Sae:
    """The SAE in a folder, folded; its weights are read without running code."""
    metadata, trainer = known(weights), _trainer(weights)
    found = read_torch(weights)
    tensors = READERS[trainer["dict_class"]](weights, found)
    if trainer["dict_class"] != "AutoEncoderTopK":
        return folded(weights, tensors, metadata)
    k = found["k"].item() if "k" in found else trainer.get("k")
    if not isinstance(k, int) or trainer.get("k", k) != k:
        raise DataError(f"{weights}: k is {k!r}, {CONFIG_FILE} says {trainer.get('k')!r}; are they of two SAEs? download both")
    return folded(weights, tensors, metadata, top_k=k)


def _relu(weights: Path, found: Tensors) -> Tensors:
    encoder, b_enc, decoder, b_dec = taken(weights, found, (*LINEAR, "bias"), "an AutoEncoder")
    return without_subtraction(_of(encoder.T, decoder.T, b_enc, b_dec, torch.zeros_like(b_enc)))


def _relu_without_subtraction(weights: Path, found: Tensors) -> Tensors:
    encoder, b_enc, decoder, b_dec = taken(weights, found, (*LINEAR, "decoder.bias"), "an AutoEncoderNew")
    return _of(encoder.T, decoder.T, b_enc, b_dec, torch.zeros_like(b_enc))


def _jumprelu(weights: Path, found: Tensors) -> Tensors:
    return _of(*taken(weights, found, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), "a JumpReluAutoEncoder"))


def _gated(weights: Path, found: Tensors) -> Tensors:
    names = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
    encoder, decoder, b_dec, r_mag, gate, b_mag = taken(weights, found, names, "a GatedAutoEncoder")
    return without_subtraction(gated(encoder.T, decoder.T, b_dec, r_mag, gate, b_mag))


def _top_k(weights: Path, found: Tensors) -> Tensors:
    encoder, b_enc, decoder, b_dec = taken(weights, found, (*LINEAR, "b_dec"), "an AutoEncoderTopK")
    return without_subtraction(_of(encoder.T, decoder.T, b_enc, b_dec, torch.zeros_like(b_enc)))


def _batch_top_k(weights: Path, found: Tensors) -> Tensors:
    encoder, b_enc, decoder, b_dec, threshold = taken(weights, found, (*LINEAR, "b_dec", "threshold"), "a BatchTopKSAE")
    return without_subtraction(_of(encoder.T, decoder.T, b_enc, b_dec, threshold.clamp(min=0).expand_as(b_enc)))


def _nested_batch_top_k(weights: Path, found: Tensors) -> Tensors:
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    W_enc, W_dec, b_enc, b_dec, threshold = taken(weights, found, names, "a MatryoshkaBatchTopKSAE")
    return without_subtraction(_of(W_enc, W_dec, b_enc, b_dec, threshold.clamp(min=0).expand_as(b_enc)))


def _of(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> Tensors:
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}


READERS: dict[str, Callable[[Path, Tensors], Tensors]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_without_subtraction,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _nested_batch_top_k,
}
"""By the class that config.json names."""


def write(folder: Path, sae: Sae) -> None:
    """ae.pt, then config.json: an AutoEncoderTopK of a TopK SAE without thresholds, a JumpReluAutoEncoder of any other."""
    require_sae(sae, "dictionary_learning's format")
    if sae.top_k is not None:
        require_relu(sae, "an AutoEncoderTopK")
        ours = with_subtraction(sae.tensors())
        tensors = {
            "encoder.weight": ours["W_enc"].T.contiguous(),
            "encoder.bias": ours["b_enc"],
            "decoder.weight": ours["W_dec"].T.contiguous(),
            "b_dec": ours["b_dec"],
            "k": torch.tensor(sae.top_k, dtype=torch.int32),
            "threshold": torch.tensor(-1.0),
        }
    else:
        tensors = sae.tensors()
    site = sae.metadata.site
    trainer = {
        "dict_class": "JumpReluAutoEncoder" if sae.top_k is None else "AutoEncoderTopK",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.top_k,
        "layer": None if site is None else site.layer,
        "lm_name": sae.metadata.model,
        "submodule_name": None if site is None else f"{site.kind}_layer_{site.layer}",
    }
    write_torch(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, {"trainer": trainer})
