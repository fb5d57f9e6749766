"""A site's folder of several small shards, and the rows that were put into it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from everyscope.activations.shards.manifest import TOKENS, seal_folder, shard_path
from everyscope.activations.shards.order import permutation
from everyscope.activations.shards.writer import new_activation_shard, write_token_shard

CONTEXT, D_IN, SIZES = 16, 5, (37, 64, 3)
SEALED = {"config": {"seed": 0}, "parents": {"model": "none"}, "version": "0"}


@dataclass(frozen=True)
class Written:
    """What reading `folder` must give."""

    folder: Path
    rows: Tensor
    sequence: Tensor
    position: Tensor


def write_site(folder: Path, dtype: str, sizes: tuple[int, ...] = SIZES, d_in: int = D_IN) -> Written:
    """Shards of random rows with means far from zero, put in two portions each, shuffled."""
    random = np.random.default_rng(0)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, size in enumerate(sizes):
        rows = torch.from_numpy(random.normal(3.0, 2.0, (size, d_in)).astype(np.float32))
        sequence, position = random.integers(0, 1000, size), random.integers(1, CONTEXT, size)
        places = permutation(size, 7, index)
        path = shard_path(folder, index)
        with new_activation_shard(path, "resid_post layer 3", size, d_in, dtype, CONTEXT, {"index": index}) as writer:
            for part in (slice(0, size // 2), slice(size // 2, size)):
                writer.put(rows[part], places[part], sequence[part], position[part])
        back = np.argsort(places)
        stored = rows.to(getattr(torch, dtype))[back]
        kept.append((stored, torch.from_numpy(sequence[back]).int(), torch.from_numpy(position[back]).int()))
    seal_folder(folder, len(sizes), site="resid_post/layer_3", **SEALED)
    return Written(folder, *(torch.cat(parts) for parts in zip(*kept, strict=True)))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def written(tmp_path: Path, dtype: str) -> Written:
    return write_site(tmp_path / "shards/resid_post/layer_3", dtype)


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder of two token shards, and all their blocks."""
    folder = tmp_path / "shards" / TOKENS
    blocks = np.random.default_rng(1).integers(0, 4096, (7, CONTEXT)).astype(np.int32)
    write_token_shard(shard_path(folder, 0), blocks[:4], {})
    write_token_shard(shard_path(folder, 1), blocks[4:], {})
    seal_folder(folder, 2, site=TOKENS, **SEALED)
    return folder, torch.from_numpy(blocks)
