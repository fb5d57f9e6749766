"""The finished SAE of several ranks: folded and written range by range of its latents, never whole in any memory.

The ranks' last checkpoint is the source, so that whoever was killed on the way can begin again, and the bytes do not depend on
how many ranks there were.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everyscope.base.files import reserve, whole_file
from everyscope.base.tensors import tensors_header
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import TENSOR_FILE, write_record
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import LATENT_AXIS, TENSORS, TrainableSae, fold
from everyscope.train.checkpoint import Parts

RANGE_NUMBERS = 2**24
"""A range of latents has about so many numbers in W_enc [numbers]."""


def save_assembled(
    folder: Path, parts: Parts, number: int, config: SaeConfig, normalisation: Normalisation, record: dict[str, Any]
) -> None:
    """Fold SAE `number` of a training group's checkpoint into `folder`, in the bytes that `sae.files.write_sae` writes.

    Raises NonFinite where training diverged.
    """
    width, d_in = config.width, len(parts.read(f"{number}.b_dec", None, range(0)))
    shapes = {"W_dec": (width, d_in), "W_enc": (d_in, width), "b_dec": (d_in,), "b_enc": (width,), "threshold": (width,)}
    header = tensors_header((name, "float32", shape) for name, shape in shapes.items())
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(header[8:]).items() if name in shapes}
    at_once = max(1, RANGE_NUMBERS // d_in)
    with whole_file(folder / TENSOR_FILE) as partial:
        with partial.open("wb") as file:
            file.write(header)
            reserve(file, len(header) + max(stop for _, stop in offsets.values()))
        tables = {
            name: np.memmap(partial, np.float32, "r+", len(header) + offsets[name][0], shape) for name, shape in shapes.items()
        }
        for start in range(0, width, at_once):
            latents = range(start, min(start + at_once, width))
            piece = fold(_shard(parts, number, config, latents), normalisation)
            tables["W_enc"][:, start : latents.stop] = piece.W_enc
            tables["W_dec"][start : latents.stop] = piece.W_dec
            tables["b_enc"][start : latents.stop] = piece.b_enc
            tables["threshold"][start : latents.stop] = piece.threshold
            tables["b_dec"][:] = piece.b_dec
        for table in tables.values():
            table.flush()
    write_record(folder, record)


def _shard(parts: Parts, number: int, config: SaeConfig, latents: range) -> TrainableSae:
    parameters = {name: parts.read(f"{number}.{name}", LATENT_AXIS[name], latents) for name in TENSORS}
    unused = torch.zeros(len(latents), dtype=torch.int32)
    return TrainableSae(config, parameters, {}, parameters["b_dec"], unused, unused, first=latents.start)
