"""SAELens, sparsify or dictionary_learning on files that we wrote: a process in that peer's environment that prints a JSON line.

For each coder the largest difference of latents and outputs from ours, relative to the largest of ours.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Each package is in an environment of its own (peers/launch.py), so that each import is where it is needed.

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = {"saelens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}


def saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """By its loader of folders; params.safetensors by its loader of Gemma Scope 2, whose downloads are turned to the folder."""
    if not (folder / "params.safetensors").exists():
        sae = importlib.import_module("sae_lens").SAE.load_from_disk(str(folder))
        return sae.encode(x), sae(x)
    loaders: Any = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    loaders.hf_hub_download = lambda repo_id, filename, **_: str(folder / Path(filename).name)
    sizes = {
        name: list(tensor.shape) for name, tensor in loaders.load_safetensors_weights(str(folder / "params.safetensors")).items()
    }
    loaders.get_safetensors_tensor_shapes = lambda *_: sizes
    config, tensors, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-pt", f"transcoder/{folder.name}")
    config = loaders.handle_config_defaulting(config)
    sae = importlib.import_module("sae_lens").SAE.from_dict(config)
    sae.load_state_dict(tensors)
    return sae.encode(x), sae(x)


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """By sparsify's loader of folders; its latents come as the k largest and their numbers."""
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(folder)
    values, latents, pre = coder.encode(x)
    return torch.zeros_like(pre).scatter_(-1, latents, values), coder(x, y=torch.zeros(len(x), len(coder.b_dec))).sae_out


def dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """By dictionary_learning's loader of folders."""
    dictionary, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(folder), "cpu")
    return dictionary.encode(x), dictionary(x)


def main(peer: str, request: dict[str, Any]) -> None:
    """The request: {"arrays": an npz with <name>/x, <name>/f, <name>/y, "coders": {name: folder}}."""
    torch.set_num_threads(1)
    read = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}[peer]
    arrays, found = np.load(request["arrays"]), {}
    for name, folder in request["coders"].items():
        x = torch.from_numpy(arrays[f"{name}/x"])
        with torch.no_grad():
            theirs = read(Path(folder), x)
        ours = arrays[f"{name}/f"], arrays[f"{name}/y"]
        found[name] = [float(np.abs(a.numpy() - b).max() / np.abs(b).max()) for a, b in zip(theirs, ours, strict=True)]
    names = (PACKAGES[peer], "torch")
    print(json.dumps({"versions": {name: version(name) for name in names}, "differences": found}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
