"""circuit-tracer: config.yaml and layer_0.safetensors, layer_1.safetensors, ...: a transcoder for every layer, all of one width.

    f = pre where pre > threshold (without one, where pre > 0), else 0,   pre = x @ W_enc.T + b_enc
    y = f @ W_dec + b_dec [+ x @ W_skip.T]

W_enc is [d_sae, d_in] and W_skip [d_out, d_in], both transposed against ours; W_dec [d_sae, d_out] is as ours. The hooks in
config.yaml say what the MLP's input is (`hooks.CONVENTIONS`). Files hold these tensors and no other: its loader is strict. All
transcoders have a skip or none has.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch, first_line
from everyscope.base.files import read_bytes, write_text
from everyscope.base.tensors import write_tensors
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.suite.formats.coder import folded, require_no_top_k
from everyscope.suite.formats.hooks import INPUT_HOOKS, described, place
from everyscope.suite.formats.weights import read_safetensors, taken

CONFIG_FILE = "config.yaml"
FILES = "layer_*.safetensors"
FILE = re.compile(r"layer_(\d+)\.safetensors")
THRESHOLD = "activation_function.threshold"
NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
SET = "transcoder_set"
MAX_CONFIG_BYTES = 1 << 20


def known(weights: Path) -> SaeMetadata:
    """What the name of a layer's file and config.yaml beside it say; ConfigError for a cross-layer transcoder."""
    path = weights.parent / CONFIG_FILE
    config, found = read_config(path), FILE.fullmatch(weights.name)
    if config.get("model_kind") != SET or found is None:
        raise ConfigError(
            f"{path}: model_kind={config.get('model_kind')!r}; a {SET}, of files layer_<n>.safetensors, can be read"
        )
    hooks = (str(config.get(f"feature_{way}_hook")) for way in ("input", "output"))
    reads, writes = (place(f"blocks.{found[1]}.{hook}") for hook in hooks)
    return described(reads, writes, model=config.get("model_name"), l0=_k(path, config), is_transcoder=True)


def _k(path: Path, config: Mapping[str, Any]) -> int | None:
    """The number of active latents of a TopK set; None for others."""
    activation, k = config.get("activation") or "relu", config.get("k")
    if activation not in ("relu", "topk", "jump_relu", "jumprelu"):
        raise ConfigError(f"{path}: activation={activation!r}; relu, jumprelu and topk can be read")
    if activation == "topk" and not (isinstance(k, int) and k > 0):
        raise ConfigError(f"{path}: activation=topk with k={k!r}, expected a whole number of latents")
    return k if activation == "topk" else None


def read(weights: Path) -> Sae:
    """The transcoder of one layer."""
    metadata, found = known(weights), read_safetensors(weights)
    if "k" in found and metadata.l0 != int(found["k"]):
        raise DataError(
            f"{weights}: holds k={int(found['k'])}, {CONFIG_FILE} says {metadata.l0}; "
            f"add activation: topk and k: {int(found['k'])}"
        )
    unknown = sorted(set(found) - {*NAMES, THRESHOLD, "W_skip", "k"})
    if unknown:
        raise DataError(f"{weights}: holds {unknown[0]}, which no transcoder of circuit-tracer has; is it of another project?")
    names = NAMES | {name: key for name, key in (("threshold", THRESHOLD), ("W_skip", "W_skip")) if key in found}
    tensors = dict(zip(names, taken(weights, found, tuple(names.values()), "a transcoder of circuit-tracer"), strict=True))
    tensors["W_enc"] = tensors["W_enc"].T
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
    return folded(weights, tensors, metadata, top_k=None if metadata.l0 is None else int(metadata.l0))


def layer_files(folder: Path) -> list[Path]:
    """The files of a set, by layer; DataError where a layer is missing between the first and the last."""
    found = {int(match[1]): path for path in folder.glob("layer_*.safetensors") if (match := FILE.fullmatch(path.name))}
    if missing := sorted(set(range(len(found))) - set(found)):
        raise DataError(f"{folder}: has {len(found)} layers' files, but none of layer {missing[0]}; download the whole set")
    return [found[layer] for layer in range(len(found))]


def write(folder: Path, transcoders: Iterable[Sae], *, model: str, output: str, scan: str) -> int:
    """A transcoder for every layer from 0 on, one in memory at a time, and config.yaml last; the number of layers.

    `model` is the id by which circuit-tracer loads the language model, `output` the hook within a block of what they write,
    `scan` where its viewer looks for the feature files. ConfigError for TopK, which its loader of folders does not know;
    ShapeMismatch where widths, sizes or input forms differ, or some have a skip and others have none.
    """
    first: Sae | None = None
    num_layers = 0
    for layer, coder in enumerate(transcoders):
        first = first or coder
        _check_alike(layer, coder, first)
        tensors = coder.tensors()
        theirs = {"W_enc": tensors["W_enc"].T.contiguous(), **{name: tensors[name] for name in ("W_dec", "b_enc", "b_dec")}}
        theirs[THRESHOLD] = tensors["threshold"]
        if "W_skip" in tensors:
            theirs["W_skip"] = tensors["W_skip"].T.contiguous()
        write_tensors(folder / f"layer_{layer}.safetensors", theirs)
        num_layers += 1
    if first is None or first.metadata.convention is None:
        raise ConfigError(
            "a set of circuit-tracer needs a transcoder of every layer, which says in which form it takes the MLP's input"
        )
    config = {
        "model_name": model,
        "model_kind": SET,
        "feature_input_hook": INPUT_HOOKS[first.metadata.convention],
        "feature_output_hook": output,
        "scan": scan,
    }
    write_text(folder / CONFIG_FILE, config_text(config))
    return num_layers


def _check_alike(layer: int, coder: Sae, first: Sae) -> None:
    require_no_top_k(coder, "circuit-tracer's loader of folders")
    if not coder.is_transcoder:
        raise ConfigError(f"layer {layer}: is an SAE; circuit-tracer's sets are of transcoders")

    def facts(of: Sae) -> tuple[Any, ...]:
        return of.d_in, of.d_sae, of.d_out, of.W_skip is not None, of.metadata.convention

    if facts(coder) != facts(first):
        raise ShapeMismatch(
            f"layer {layer}: d_in, d_sae, d_out, skip and input are {facts(coder)}, of layer 0 {facts(first)}; expected equals"
        )


def config_text(config: Mapping[str, str]) -> str:
    """YAML of names and texts, in their order."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=math.inf)


def read_config(path: Path) -> dict[str, Any]:
    """The names and values of a config.yaml, by YAML's safe loader; DataError where it is no YAML, or holds no names."""
    try:
        found = yaml.safe_load(read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8", "replace"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: is no YAML ({first_line(error)}); download the set again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, expected names and their values")
    return {str(name): value for name, value in found.items()}
