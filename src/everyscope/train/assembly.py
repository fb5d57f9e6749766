"""The finished SAE of several ranks: folded and written range by range of its latents, never whole in any memory.

The ranks' last checkpoint is the source, so that a killed assembly can begin again, and the bytes do not depend on
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
    folder: Path,
    parts: Parts,
    number: int,
    config: SaeConfig,
    normalisation: Normalisation,
    record: dict[str, Any],
    target: Normalisation | None = None,
) -> None:
    """Fold SAE `number` of a training group's checkpoint into `folder`, in the bytes that `sae.files.write_sae` writes.

    Of a transcoder, `target` is how its target was seen. Raises NonFinite where training diverged.
    """
    width, d_out = config.width, len(parts.read(f"{number}.b_dec", None, range(0)))
    d_in = len(parts.read(f"{number}.coordinate_weights", None, range(0)))
    shapes = {"W_dec": (width, d_out), "W_enc": (d_in, width), "b_dec": (d_out,), "b_enc": (width,), "threshold": (width,)}
    if config.skip:
        shapes["W_skip"] = (d_in, d_out)
    header = tensors_header((name, "float32", shape) for name, shape in sorted(shapes.items()))
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
            piece = fold(_shard(parts, number, config, latents, target is not None), normalisation, target)
            tables["W_enc"][:, start : latents.stop] = piece.W_enc
            tables["W_dec"][start : latents.stop] = piece.W_dec
            tables["b_enc"][start : latents.stop] = piece.b_enc
            tables["threshold"][start : latents.stop] = piece.threshold
            tables["b_dec"][:] = piece.b_dec
            if piece.W_skip is not None:
                tables["W_skip"][:] = piece.W_skip
        for table in tables.values():
            table.flush()
    write_record(folder, record)


def _shard(parts: Parts, number: int, config: SaeConfig, latents: range, is_transcoder: bool) -> TrainableSae:
    names = (*TENSORS, *(["w_skip"] if config.skip else []))
    parameters = {name: parts.read(f"{number}.{name}", LATENT_AXIS[name], latents) for name in names}
    unused = torch.zeros(len(latents), dtype=torch.int32)
    return TrainableSae(config, parameters, {}, parameters["b_dec"], unused, unused, latents.start, is_transcoder)
