"""Sites of small shards whose rows carry their own number, and servers of them in this process."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.origin import ShardOrigin
from everyscope.activations.serve.run import Serving, serving
from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard

D_IN, SIZES = 6, (370, 640, 31)
NUM_ROWS = sum(SIZES)
CHUNK_ROWS = 100
SITES = {"resid_post/layer_0": "bfloat16", "mlp_out/layer_1": "float32"}
LARGEST_CHUNK = CHUNK_ROWS * D_IN * 4


def write_site(folder: Path, site: str, dtype: str = "float32", sizes: tuple[int, ...] = SIZES, d_in: int = D_IN) -> None:
    """Row r holds r in two digits to base 100, exact in bfloat16, then noise."""
    start, noise = 0, torch.Generator().manual_seed(0)
    for index, size in enumerate(sizes):
        number = torch.arange(start, start + size)
        rows = torch.randn(size, d_in, generator=noise)
        rows[:, 0], rows[:, 1] = number // 100, number % 100
        places = np.arange(size)
        with new_activation_shard(shard_path(folder, index), site, size, d_in, dtype, 16, {}) as writer:
            writer.put(rows, places, places, places % 16)
        start += size
    seal_folder(folder, len(sizes), site=site, config={"dtype": dtype}, parents={}, version="0")


def write_sites(root: Path) -> Path:
    """All of SITES below `root`."""
    for site, dtype in SITES.items():
        write_site(root / site, site, dtype)
    return root


def row_ids(batch: torch.Tensor) -> list[int]:
    """Which rows a batch holds."""
    return (batch[:, 0] * 100 + batch[:, 1]).long().tolist()


class Start:
    """Starts servers of the sites below `shards`, on free ports of this host."""

    def __init__(self, shards: Path, stack: ExitStack) -> None:
        self.shards, self.stack = shards, stack

    def __call__(self, **changes) -> Serving:
        fields = {
            "shards": self.shards,
            "listen": "127.0.0.1:0",
            "chunk_rows": CHUNK_ROWS,
            "buffer_bytes": 8 * LARGEST_CHUNK,
            "wait_seconds": 0.5,
            "drain_seconds": 10,
        }
        config = ServeConfig(**(fields | changes))
        return self.stack.enter_context(serving(config, ShardOrigin(config.shards, config.chunk_rows)))

    def url(self, site: str = "resid_post/layer_0", slices: int = 1, **changes) -> str:
        """The URL of a site on new servers, one for each slice."""
        ports = [self(slice=f"{index}/{slices}", **changes).port for index in range(slices)]
        return f"flight://{','.join(f'127.0.0.1:{port}' for port in ports)}/{site}"
