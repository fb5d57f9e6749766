"""Qwen-Scope (arXiv 2605.11887): layer<n>.sae.pt for every layer and one config.json; TopK SAEs of the residual stream.

    f = the k largest of relu(x @ W_enc.T + b_enc), else 0,   x_hat = f @ W_dec.T + b_dec

with W_enc [d_sae, d_in] and W_dec [d_in, d_sae], both transposed against ours.
"""

import re
from pathlib import Path
from typing import Any

import torch

from everyscope.base.errors import ConfigError
from everyscope.base.files import read_object, write_json
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.formats.coder import folded, require_relu, require_sae
from everyscope.suite.formats.hooks import described
from everyscope.suite.formats.weights import read_torch, taken, write_torch

CONFIG_FILE = "config.json"
FILES = "layer*.sae.pt"
FILE = re.compile(r"layer(\d+)\.sae\.pt")
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
FIELDS = ("model_type", "base_model", "d_model", "d_sae", "k", "num_layers", "hook_point")


def known(weights: Path) -> SaeMetadata:
    """What the name of the file and config.json beside it say; ConfigError where they say no k, or another kind of SAE."""
    config = _config(weights)
    found = FILE.fullmatch(weights.name)
    if found is None or config.get("hook_point") not in ("resid_post", None):
        raise ConfigError(f"{weights}: expected layer<n>.sae.pt with hook_point resid_post, got {config.get('hook_point')!r}")
    site = Site("resid_post", int(found[1]))
    return described((site, None), (site, None), model=config.get("base_model"), l0=config["k"])


def read(weights: Path) -> Sae:
    """The TopK SAE in `weights`."""
    metadata = known(weights)
    W_enc, W_dec, b_enc, b_dec = taken(weights, read_torch(weights), NAMES, "a Qwen-Scope file")
    tensors = {"W_enc": W_enc.T, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec, "threshold": torch.zeros_like(b_enc)}
    return folded(weights, tensors, metadata, top_k=_config(weights)["k"])


def write(folder: Path, sae: Sae, *, num_layers: int) -> None:
    """layer<n>.sae.pt of a TopK SAE of the residual stream, and config.json, which its siblings share.

    ConfigError for another kind or site.
    """
    require_sae(sae, "Qwen-Scope's format")
    require_relu(sae, "Qwen-Scope's format")
    site = sae.metadata.site
    if site is None or site.kind != "resid_post":
        raise ConfigError(f"{site or 'an SAE without a site'}: Qwen-Scope has SAEs of resid_post alone")
    tensors = sae.tensors()
    matrices = {name: tensors[name].T.contiguous() for name in ("W_enc", "W_dec")}
    write_torch(folder / f"layer{site.layer}.sae.pt", matrices | {name: tensors[name] for name in ("b_enc", "b_dec")})
    values = ("topk_sae", sae.metadata.model, sae.d_in, sae.d_sae, sae.top_k, num_layers, "resid_post")
    write_json(folder / CONFIG_FILE, dict(zip(FIELDS, values, strict=True)))


def _config(weights: Path) -> dict[str, Any]:
    path = weights.parent / CONFIG_FILE
    config = read_object(path)
    if config.get("model_type", "topk_sae") != "topk_sae" or not isinstance(config.get("k"), int):
        raise ConfigError(
            f"{path}: model_type={config.get('model_type')!r}, k={config.get('k')!r}; expected topk_sae and a whole k"
        )
    return config
