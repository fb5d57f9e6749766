"""Transcoders from two sites' shards: aligned rows or none, the same bits after an interruption, and the SAE as target = site."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.local import ArraySource, LocalSource
from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.files import read_sae
from everyscope.sae.presets import fast_transcoder
from everyscope.sites.names import Site
from everyscope.train.arrays import train_transcoders
from everyscope.train.config import TrainConfig, TrainSettings, sae_name
from everyscope.train.run import run

ROWS, D, BATCH, STEPS = 600, 12, 32, 120
READS, WRITES = Site("mlp_in", 1), Site("mlp_out", 1)
RECIPE = SaePreset(
    learning_rate=5e-3, learning_rate_warmup_steps=10, sparsity_warmup_steps=50, bandwidth=0.1, initial_threshold=0.1
)


def write(folder: Path, site: Site, rows: np.ndarray, position: np.ndarray) -> None:
    path, half = folder / site.folder, len(rows) // 2
    for index in range(2):
        part = slice(index * half, (index + 1) * half)
        with new_activation_shard(shard_path(path, index), str(site), half, D, "float32", 16, {}) as writer:
            block = np.arange(len(rows))[part]
            writer.put(torch.from_numpy(rows[part].astype(np.float32)), np.arange(half), block, position[part])
    seal_folder(path, 2, site=site.folder, config={}, parents={}, version="0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    x, position = random.normal(1.0, 2.0, (ROWS, D)), random.integers(1, 16, ROWS)
    y = np.maximum(x @ random.normal(size=(D, 30)), 0) @ random.normal(size=(30, D)) + 3
    write(folder, READS, x, position)
    write(folder, WRITES, y, position)
    write(folder / "shuffled", WRITES, y, np.roll(position, 1))
    write(folder / "shorter", WRITES, y[:500], position[:500])
    return folder


def group(shards: Path, out: Path, **changes) -> TrainConfig:
    saes = tuple(
        SaeConfig(width=32, sparsity_coefficient=c, preset=RECIPE, skip=skip) for c, skip in ((1e-3, False), (1e-2, True))
    )
    fields = {
        "site": READS,
        "target": WRITES,
        "shards": shards / READS.folder,
        "target_shards": shards / WRITES.folder,
        "saes": saes,
        "num_tokens": STEPS * BATCH,
        "settings": TrainSettings(batch_rows=BATCH, checkpoint_steps=25, log_steps=10),
        "out": out,
    }
    return TrainConfig(**(fields | changes))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".speed.json")
    }


def test_interrupted_training_ends_in_the_same_bytes(shards, tmp_path):
    whole, stopped = group(shards, tmp_path / "whole"), group(shards, tmp_path / "stopped")
    run(whole)
    for limit in (40, 33, 55):
        seen = 0

        def progress(steps: int, limit: int = limit) -> None:
            nonlocal seen
            seen += steps
            if seen > limit + steps * (steps > 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(stopped, progress)
    run(stopped)
    assert tree(stopped.out) == tree(whole.out)
    assert {path.name for path in whole.out.iterdir() if path.is_dir()} == {
        "width_32_sparsity_0.001_seed_0",
        "width_32_sparsity_0.01_seed_0_skip",
    }


def test_what_is_written_says_what_it_is_and_predicts(shards, tmp_path):
    config = group(shards, tmp_path)
    run(config)
    coder, record = read_sae(config.out / sae_name(config.saes[1]))
    assert coder.metadata.coder_site == config.coder_site == Site("transcoder", 1)
    assert (coder.metadata.site, coder.metadata.target, coder.metadata.convention) == (READS, WRITES, "mlp_input")
    assert (record["site"], record["reads"], record["has_skip"], record["d_out"]) == ("transcoder", "mlp_in/layer_1", True, D)
    assert record["parents"] == [LocalSource(shards / site.folder).identity for site in (READS, WRITES)]
    x, y = (LocalSource(shards / site.folder).batch(0, ROWS) for site in (READS, WRITES))
    assert (coder(x) - y).square().sum() < 0.5 * (y - y.mean(0)).square().sum()


def test_a_target_that_is_the_site_trains_saes_to_the_bit(shards, tmp_path):
    saes = (SaeConfig(width=32, sparsity_coefficient=1e-3, preset=RECIPE),)
    plain = group(shards, tmp_path / "plain", saes=saes, target=None, target_shards=None)
    same = group(shards, tmp_path / "same", saes=saes, target=READS)
    assert plain.group_id == same.group_id
    assert plain.identity_of(saes[0], "x") == same.identity_of(saes[0], "x") != group(shards, tmp_path).identity_of(saes[0], "x")
    run(plain)
    run(same)
    names = [f"{sae_name(saes[0])}/{name}" for name in ("sae.safetensors", "sae.json")]
    assert [tree(plain.out)[name] for name in names] == [tree(same.out)[name] for name in names]


@pytest.mark.parametrize(("folder", "complaint"), [("shuffled", "is of block 0, position"), ("shorter", "600 and 500 rows")])
def test_rows_that_do_not_belong_together_are_refused(shards, tmp_path, folder, complaint):
    with pytest.raises(DataError, match=complaint):
        run(group(shards, tmp_path, target_shards=shards / folder / WRITES.folder))


def test_aligned_rows_are_those_of_each_site(shards):
    sources = [LocalSource(shards / site.folder) for site in (READS, WRITES)]
    both = Aligned(*sources)
    for step in (0, 7, 30):
        for got, source in zip(both.rows(step, 50), sources, strict=True):
            assert torch.equal(got, source.batch(step, 50))
    assert both.identity not in {source.identity for source in sources}
    with pytest.raises(ShapeMismatch, match="other positions"):
        Aligned(ArraySource(np.ones((ROWS, 3)) + np.eye(ROWS, 3)), sources[0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target_shards": None}, "give target_shards"),
        ({"source": "flight://a:1/mlp_in/layer_1"}, "target_source where source is given"),
        ({"target": Site("mlp_out", 2)}, "no transcoder's pair"),
        ({"target": None}, "skip=True of an SAE"),
        (
            {"saes": (SaeConfig(width=8, target_l0=2, preset=fast_transcoder(12).model_copy(update={"encoder_follows": True})),)},
            "fast_t",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(shards, tmp_path, changes, complaint):
    with pytest.raises((ValidationError, ConfigError), match=complaint):
        group(shards, tmp_path, **changes)


@pytest.mark.parametrize("engine", ["dense", "pairs"])
def test_arrays_train_too(engine):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 10, generator=g)
    y = torch.relu(x @ torch.randn(10, 40, generator=g)) @ torch.randn(40, 6, generator=g)
    configs = [SaeConfig(width=64, target_l0=6, skip=skip) for skip in (False, True)]
    got = train_transcoders(
        x, y, configs, num_passes=20, batch_rows=100, preset="fast_transcoder", engine=engine, site="mlp_in.2", target="mlp_out.2"
    )
    fvus = [float((coder(x) - y).square().sum() / (y - y.mean(0)).square().sum()) for coder in got]
    assert fvus[1] < fvus[0] < 0.6
    assert [coder.metadata.coder_site for coder in got] == [Site("transcoder", 2)] * 2
    assert (got[0].d_in, got[0].d_out, got[0].W_skip) == (10, 6, None)
    with pytest.raises(ShapeMismatch, match="3000 and 2999 rows"):
        train_transcoders(x, y[1:], configs, num_passes=1, batch_rows=100)
