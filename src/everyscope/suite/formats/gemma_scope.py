"""Gemma Scope (arXiv 2408.05147): params.npz, five arrays in our names and layout, folded; SAEs, and transcoders of Gemma 2 2B.

The file says nothing of itself: site, layer, model and L0 are in its path alone. Transcoders read the MLP's input normalised and
without the norm's gain (convention A).
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import whole_file
from everyscope.sae.folded import PARAMETERS, SKIP, Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site, SiteKind
from everyscope.suite.formats.coder import folded, require_no_top_k
from everyscope.suite.formats.hooks import described, mlp_input
from everyscope.suite.formats.npz import NPZ_FILE, array_names, read_arrays

RELEASE = re.compile(
    r"(?:.*/)?(?:models--google--)?gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)/.*?layer_(\d+)/width_[0-9a-z]+/average_l0_(\d+)"
)
"""The paths in DeepMind's first release, in the hub's cache or in a folder of the repository's name."""
HUB = "google/"
"""What hub ids of that release begin with."""
KINDS: dict[str, SiteKind] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
UNFOLDED = ("scal", "norm", "skip")
"""Parts of names of arrays beside the five that change what an SAE computes, unless they are 1 everywhere (0 for a skip)."""


def known(weights: Path | str) -> SaeMetadata:
    """What the path of a file, or a hub id, says of the coder in it; nothing where it is not DeepMind's."""
    found = RELEASE.fullmatch(str(weights).replace("\\", "/").strip("/").removesuffix(f"/{NPZ_FILE}"))
    if found is None:
        return SaeMetadata()
    size, tuned, kind, layer, l0 = found.groups()
    model = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    if kind == "transcoders":
        return described(mlp_input(int(layer), "normalised"), (Site("mlp_out", int(layer)), None), model=model, l0=float(l0))
    site = Site(KINDS[kind], int(layer))
    return described((site, None), (site, None), model=model, l0=float(l0))


def read(weights: Path) -> Sae:
    """The SAE or transcoder in a params.npz, in float32, with the old names of its keys too.

    DataError for what is no npz of plain floating-point numbers or holds a tensor under two names, ConfigError for a scaling
    factor, or a skip connection, that is not folded into the weights.
    """
    found = array_names(weights)
    by_name = {key: [name for name in found if name.lower() == key.lower()] for key in PARAMETERS}
    doubled = next((names for names in by_name.values() if len(names) > 1), None)
    if doubled is not None:
        raise DataError(f"{weights}: holds both {' and '.join(doubled)}, which are one tensor; delete one of them")
    factors = [name for name in found if name != SKIP and any(word in name.lower() for word in UNFOLDED)]
    chosen = {key: names[0] for key, names in by_name.items() if names} | ({SKIP: SKIP} if SKIP in found else {})
    arrays = read_arrays(weights, [*chosen.values(), *factors])
    for name in factors:
        require_folded(weights, name, arrays[name])
    metadata, tensors = known(weights.absolute()), {key: torch.from_numpy(arrays[name]) for key, name in chosen.items()}
    sizes = [tensors[name].shape for name in ("W_enc", "b_dec") if name in tensors and tensors[name].ndim]
    if SKIP in tensors or len({size[0] for size in sizes}) > 1:
        metadata = replace(metadata, kind="transcoder")
    return folded(weights, tensors, metadata)


def require_folded(path: Path, name: str, values: np.ndarray) -> None:
    """ConfigError unless a factor is 1 everywhere, or a skip 0."""
    neutral = 0 if "skip" in name.lower() else 1
    if not np.all(values == neutral):
        raise ConfigError(f"{path}: {name} is not {neutral} everywhere; only folded SAEs are read, rescale W_enc and W_dec first")


def write(folder: Path, sae: Sae) -> None:
    """params.npz: five float32 arrays, and W_skip [d_in, d_out] where a transcoder has one, which DeepMind's have not.

    numpy stores entries uncompressed and dated 1980, so the bytes depend on the tensors alone.
    """
    require_no_top_k(sae, "params.npz")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in sae.tensors().items()}
    with whole_file(folder / NPZ_FILE) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
