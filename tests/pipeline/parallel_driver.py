"""What the ranks of test_parallel_training.py do, where spawned processes can find it."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import distributed

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.mesh import Mesh
from everyscope.sae.presets import fast
from everyscope.sites.names import Site
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.launch import RankInfo
from everyscope.train.process_group import ProcessGroup, file_store
from everyscope.train.run import run_rank

ROWS, D_IN, BATCH, STEPS, SCALE = 640, 16, 64, int(os.environ.get("EVERYSCOPE_TEST_STEPS", "200")), 2.0
CHECKPOINT_STEPS = 25
FIXED = {"learning_rate": 2e-3, "learning_rate_warmup_steps": 3, "sparsity_warmup_steps": 10}
SAES = (
    SaeConfig(width=61, target_l0=5, preset=fast(D_IN).model_copy(update={"is_centred": False, "largest_row": None})),
    SaeConfig(
        width=62,
        target_l0=8,
        target_weight=1,
        preset=SaePreset(bandwidth=0.1, initial_threshold=0.4, frequency_limit=0.1, prefix_shares=(1 / 16, 1 / 4, 1.0), **FIXED),
    ),
)


def training_group(shards: Path, out: Path, latent_shards: int = 1, replicas: int = 1, **changes) -> TrainConfig:
    settings = {"batch_rows": BATCH, "checkpoint_steps": CHECKPOINT_STEPS, "log_steps": 10}
    settings |= {name: changes.pop(name) for name in list(changes) if name in TrainSettings.model_fields}
    fields = {
        "site": Site("mlp_out", 1),
        "shards": shards,
        "saes": SAES,
        "num_tokens": STEPS * BATCH,
        "settings": TrainSettings(latent_shards=latent_shards, replicas=replicas, **settings),
        "out": out,
    }
    return TrainConfig(**(fields | changes))


MESHES = {2: [(2, 1), (1, 2)], 4: [(4, 1), (1, 4), (2, 2)]}


def train_on_every_mesh(config: TrainConfig, rank_info: RankInfo, progress: Callable[[int], None]) -> None:
    """One rank of so many, through all meshes of that number, whose processes need to start only once."""
    store = file_store(rank_info.rendezvous, rank_info.ranks)
    for number, (latent_shards, replicas) in enumerate(MESHES[rank_info.ranks]):
        prefixed = distributed.PrefixStore(str(number), store)  # pyright: ignore[reportPrivateImportUsage]
        group = ProcessGroup(Mesh(latent_shards, replicas, rank_info.rank), prefixed)
        part = training_group(config.shards, config.out / f"{latent_shards}_{replicas}", latent_shards, replicas)
        run_rank(part, group, lambda steps: None)
        assert bool(group.bytes_reduced["shards"]) == (latent_shards > 1)
        assert bool(group.bytes_reduced["replicas"]) == (replicas > 1)
    progress(len(MESHES[rank_info.ranks]))
