"""Two processes train the transcoders that one trains, as shards of the latents or as replicas on halves of the rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.files import read_sae
from everyscope.sites.names import Site
from everyscope.train.config import TrainConfig, TrainSettings, sae_name
from everyscope.train.run import is_finished, run

ROWS, D, BATCH, STEPS, TOLERANCE = 600, 12, 32, 60, 1e-4
READS, WRITES = Site("mlp_in", 1), Site("mlp_out", 1)
PRESET = SaePreset(
    learning_rate=5e-3,
    learning_rate_warmup_steps=10,
    sparsity_warmup_steps=50,
    bandwidth=0.1,
    initial_threshold=0.1,
    epsilon=1e-3,
)
CODERS = tuple(SaeConfig(width=32, sparsity_coefficient=c, preset=PRESET, skip=skip) for c, skip in ((1e-3, False), (1e-2, True)))


def write(folder: Path, site: Site, rows: np.ndarray) -> None:
    with new_activation_shard(shard_path(folder, 0), str(site), len(rows), D, "float32", 16, {}) as writer:
        places = np.arange(len(rows))
        writer.put(torch.from_numpy(rows.astype(np.float32)), places, places, places % 16)
    seal_folder(folder, 1, site=site.folder, config={}, parents={}, version="0")


def group(folder: Path, out: Path, **ranks: int) -> TrainConfig:
    return TrainConfig(
        site=READS,
        target=WRITES,
        shards=folder / READS.folder,
        target_shards=folder / WRITES.folder,
        saes=CODERS,
        num_tokens=STEPS * BATCH,
        settings=TrainSettings(batch_rows=BATCH, checkpoint_steps=25, precision="float32", **ranks),
        out=out,
    )


@pytest.mark.parametrize("ranks", [{"latent_shards": 2}, {"replicas": 2}])
def test_two_processes_train_what_one_trains(tmp_path, ranks):
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    x = random.normal(1.0, 2.0, (ROWS, D))
    write(tmp_path / READS.folder, READS, x)
    write(tmp_path / WRITES.folder, WRITES, np.maximum(x @ random.normal(size=(D, 30)), 0) @ random.normal(size=(30, D)) + 3)
    alone, pair = group(tmp_path, tmp_path / "alone"), group(tmp_path, tmp_path / "pair", **ranks)
    for config in (alone, pair):
        run(config)
        assert is_finished(config)
    for coder in CODERS:
        (ours, record), (theirs, _) = (read_sae(config.out / sae_name(coder)) for config in (pair, alone))
        assert (record["site"], record["has_skip"]) == ("transcoder", coder.skip)
        assert ours.metadata == theirs.metadata
        for name, tensor in theirs.own_tensors().items():
            apart = (ours.own_tensors()[name] - tensor).norm() / tensor.norm()
            assert apart < TOLERANCE, (sae_name(coder), name, float(apart))
