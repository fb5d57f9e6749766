"""sparsify (EleutherAI): cfg.json and sae.safetensors in a folder named after a module; TopK SAEs and (skip) transcoders.

    f = the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias), else 0,   y = f @ W_dec + b_dec [+ x @ W_skip.T]

A transcoder subtracts nothing. W_skip is [d_out, d_in]: transposed against ours. An SAE of a module is of the module's output; a
transcoder reads the module's input and writes its output.
"""

import re
from pathlib import Path
from typing import Any

import torch

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import read_object, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.formats.coder import folded, require_relu, with_subtraction, without_subtraction
from everyscope.suite.formats.hooks import NOWHERE, HookLocation, described, mlp_input
from everyscope.suite.formats.weights import read_safetensors, taken

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
RUN_FILE = "config.json"
"""Of the whole run, one folder up; it names the model."""
NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
MODULE = re.compile(r"(?:.*[./])?(?:layers|h)\.(\d+)(\.mlp)?")


def known(weights: Path) -> SaeMetadata:
    """What cfg.json, the folder's name and the run's config.json say; ConfigError for activations that are not TopK."""
    folder = weights.parent
    config = read_object(folder / CONFIG_FILE)
    if config.get("activation", "topk") != "topk" or config.get("signed") or not isinstance(config.get("k"), int):
        raise ConfigError(
            f"{folder / CONFIG_FILE}: activation={config.get('activation', 'topk')!r}, signed={config.get('signed', False)!r}, "
            f"k={config.get('k')!r}; only topk of positive latents, with a whole k, can be read"
        )
    run = read_object(folder.parent / RUN_FILE) if (folder.parent / RUN_FILE).is_file() else {}
    reads, writes = _places(folder.name, _is_transcoder(config))
    return described(reads, writes, model=run.get("model"), l0=config["k"], is_transcoder=_is_transcoder(config))


def _is_transcoder(config: dict[str, Any]) -> bool:
    return bool(config.get("transcode") or config.get("skip_connection"))


def _places(name: str, is_transcoder: bool) -> tuple[HookLocation, HookLocation]:
    if name == "embed_tokens" and not is_transcoder:
        return (Site("embed", 0), None), (Site("embed", 0), None)
    found = MODULE.fullmatch(name)
    if found is None or (is_transcoder and not found[2]):
        return NOWHERE, NOWHERE
    layer = int(found[1])
    writes: HookLocation = (Site("mlp_out" if found[2] else "resid_post", layer), None)
    return (mlp_input(layer, "mlp_input") if is_transcoder else writes), writes


def read(weights: Path) -> Sae:
    """The SAE or transcoder in a folder; ShapeMismatch where weights and cfg.json are not of one coder."""
    metadata, config, found = known(weights), read_object(weights.parent / CONFIG_FILE), read_safetensors(weights)
    if bool(config.get("skip_connection")) != ("W_skip" in found):
        raise ShapeMismatch(
            f"{weights}: has {'a' if 'W_skip' in found else 'no'} W_skip, {CONFIG_FILE} says "
            f"skip_connection={config.get('skip_connection')!r}; are they of two coders? download both"
        )
    encoder, b_enc, W_dec, b_dec = taken(weights, found, NAMES, "a sparsify file")
    tensors = {"W_enc": encoder.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": torch.zeros_like(b_enc)}
    if not config.get("transcode"):
        tensors = without_subtraction(tensors)
    if "W_skip" in found:
        tensors["W_skip"] = taken(weights, found, ("W_skip",), "a skip transcoder of sparsify")[0].T
    return folded(weights, tensors, metadata, top_k=config["k"])


def write(folder: Path, coder: Sae) -> None:
    """sae.safetensors, then cfg.json, of a TopK coder; `folder` is to have the module's name. ConfigError for another kind."""
    require_relu(coder, "sparsify's format")
    tensors = coder.tensors() if coder.is_transcoder else with_subtraction(coder.tensors())
    theirs = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if "W_skip" in tensors:
        theirs["W_skip"] = tensors["W_skip"].T.contiguous()
    config = {
        "activation": "topk",
        "expansion_factor": max(1, coder.d_sae // coder.d_in),
        "normalize_decoder": False,
        "num_latents": coder.d_sae,
        "k": coder.top_k,
        "multi_topk": False,
        "skip_connection": "W_skip" in tensors,
        "transcode": coder.is_transcoder,
        "d_in": coder.d_in,
    }
    write_tensors(folder / WEIGHTS_FILE, theirs)
    write_json(folder / CONFIG_FILE, config)
