"""Gemma Scope 2 (DeepMind, December 2025): config.json and params.safetensors; SAEs and transcoders of one layer.

    f = pre where pre > threshold, else 0,   pre = x @ w_enc + b_enc,   y = f @ w_dec + b_dec [+ x @ affine_skip_connection]

The skip is [d_in, d_out]: not transposed. Transcoders read the MLP's input with the norm's gain (convention B). Crosscoders and
cross-layer transcoders, which have a file for each layer, are refused.
"""

from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import read_object, write_json
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.suite.formats.coder import folded, require_no_top_k
from everyscope.suite.formats.hooks import described, module_name, module_place
from everyscope.suite.formats.weights import read_safetensors, taken

CONFIG_FILE, WEIGHTS_FILE = "config.json", "params.safetensors"
NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"


def known(weights: Path) -> SaeMetadata:
    """What config.json says; ConfigError for a coder of several layers, or another activation."""
    path = weights.parent / CONFIG_FILE
    config = read_object(path)
    kind, architecture = config.get("type", "sae"), config.get("architecture")
    if kind not in ("sae", "transcoder"):
        raise ConfigError(f"{path}: type={kind!r} reads or writes several layers; SAEs and transcoders of one layer can be read")
    if architecture != "jump_relu":
        raise ConfigError(f"{path}: architecture={architecture!r}, expected jump_relu")
    source, target = str(config.get("hf_hook_point_in")), config.get("hf_hook_point_out")
    reads = module_place(source)
    writes = reads if target is None else module_place(str(target))
    return described(
        reads, writes, model=_model(config.get("model_name")), l0=config.get("l0"), is_transcoder=kind == "transcoder"
    )


def _model(name: str | None) -> str | None:
    """The hub's id of the model: early uploads write gemma-v3, or leave the maker out, and 270m has no -pt there."""
    if name is None:
        return None
    name = name.replace("gemma-v3", "gemma-3")
    name = f"google/{name}" if name.startswith("gemma-3") else name
    return name.removesuffix("-pt") if "gemma-3-270m" in name else name


def read(weights: Path) -> Sae:
    """The SAE or transcoder in a folder; ShapeMismatch where weights and config.json are not of one coder."""
    metadata, config = known(weights), read_object(weights.parent / CONFIG_FILE)
    found = read_safetensors(weights)
    names = NAMES | ({"W_skip": SKIP} if SKIP in found else {})
    tensors = dict(zip(names, taken(weights, found, tuple(names.values()), "a Gemma Scope 2 file"), strict=True))
    wants_skip = config.get("affine_connection", SKIP in found)
    if bool(wants_skip) != (SKIP in found):
        raise ShapeMismatch(
            f"{weights}: has {'a' if SKIP in found else 'no'} {SKIP}, {CONFIG_FILE} says affine_connection={wants_skip!r}; "
            "are they of two coders? download both"
        )
    return folded(weights, tensors, metadata)


def write(folder: Path, coder: Sae) -> None:
    """params.safetensors, then config.json: a folder with a config is whole. ConfigError for TopK, or a site that it cannot name.

    A transcoder must take the MLP's input with the norm's gain (`sae.conventions` converts it).
    """
    require_no_top_k(coder, "Gemma Scope 2's format")
    known = coder.metadata
    if known.is_transcoder and known.convention != "mlp_input":
        raise ConfigError(
            f"Gemma Scope 2's transcoders take mlp_input, this one {known.convention}; convert it with to_convention"
        )
    tensors = coder.tensors()
    config: dict[str, Any] = {
        "hf_hook_point_in": module_name(known.site),
        "hf_hook_point_out": module_name(known.target if known.is_transcoder else known.site),
        "width": coder.d_sae,
        "model_name": known.model,
        "architecture": "jump_relu",
        "l0": None if known.l0 is None else round(known.l0),
        "affine_connection": coder.W_skip is not None,
        "type": "transcoder" if known.is_transcoder else "sae",
    }
    names = NAMES | ({"W_skip": SKIP} if coder.W_skip is not None else {})
    write_tensors(folder / WEIGHTS_FILE, {theirs: tensors[ours] for ours, theirs in names.items()})
    write_json(folder / CONFIG_FILE, config)
