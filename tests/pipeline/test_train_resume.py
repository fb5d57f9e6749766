"""Training killed at any moment gives, with the same command, the same bytes as training left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from everyscope.base.errors import ConfigError, DamagedData, DataError
from everyscope.base.files import read_json
from everyscope.sae.config import SaeConfig, SaeRecipe
from everyscope.shards.manifest import seal_folder, shard_path
from everyscope.shards.writer import new_activation_shard
from everyscope.sites.names import Site
from everyscope.train.config import BankSettings, TrainConfig
from everyscope.train.run import checkpoint_path, is_finished, run

ROWS, D_IN, BATCH, STEPS = 600, 12, 32, 400
RARE_CHECKPOINTS = BankSettings(batch_rows=BATCH, checkpoint_steps=10**6, log_steps=10)
CHILD = """
import sys, torch
torch.set_num_threads(1)
from everyscope.train.config import TrainConfig
from everyscope.train.run import run
run(TrainConfig.model_validate_json(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "mlp_out/layer_1"
    random = np.random.default_rng(0)
    for index in range(2):
        size = ROWS // 2
        with new_activation_shard(shard_path(folder, index), "mlp_out layer 1", size, D_IN, "float32", 16, {}) as writer:
            rows = torch.from_numpy(random.normal(1.0, 2.0, (size, D_IN)).astype(np.float32))
            writer.put(rows, np.arange(size), np.arange(size), np.ones(size, np.int64))
    seal_folder(folder, 2, site="mlp_out/layer_1", config={}, parents={}, version="0")
    return folder


def bank(shards: Path, out: Path, **changes) -> TrainConfig:
    recipe = SaeRecipe(
        learning_rate=5e-3, learning_rate_warmup_steps=10, sparsity_warmup_steps=50, bandwidth=0.1, initial_threshold=0.1
    )
    saes = tuple(SaeConfig(width=width, sparsity_coefficient=c, recipe=recipe) for width, c in ((32, 1e-3), (48, 1e-2)))
    settings = BankSettings(batch_rows=BATCH, checkpoint_steps=30, log_steps=10)
    fields = {
        "site": Site("mlp_out", 1),
        "shards": shards,
        "saes": saes,
        "num_tokens": STEPS * BATCH,
        "settings": settings,
        "out": out,
    }
    return TrainConfig(**(fields | changes))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, config.model_dump_json()], env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_after_lines(config: TrainConfig, lines: int, sent: signal.Signals = signal.SIGKILL) -> int:
    """Run the bank in a process of its own, send it a signal once its metrics have so many lines; what it exits with."""
    child = start(config)
    log = config.out / f"bank_{config.bank_id}.metrics.jsonl"
    while child.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            child.send_signal(sent)
            break
        time.sleep(0.001)
    return child.wait()


def test_killed_training_ends_in_the_same_bytes(shards, tmp_path):
    torch.set_num_threads(1)
    undisturbed, killed = bank(shards, tmp_path / "undisturbed"), bank(shards, tmp_path / "killed")
    run(undisturbed)
    for lines in (1, 14, 15, 40, 78):
        kill_after_lines(killed, lines)
    assert start(killed).wait() == 0
    got = tree(killed.out)
    assert got == tree(undisturbed.out)
    assert len([name for name in got if name.endswith("sae.safetensors")]) == 2
    assert not [name for name in got if name.endswith(".partial")]


def test_sigterm_keeps_every_step_done(shards, tmp_path):
    torch.set_num_threads(1)
    undisturbed, ended = bank(shards, tmp_path / "undisturbed"), bank(shards, tmp_path / "ended", settings=RARE_CHECKPOINTS)
    run(undisturbed)
    assert kill_after_lines(ended, 20, signal.SIGTERM) == 128 + signal.SIGTERM
    with safe_open(checkpoint_path(ended), "pt") as file:
        assert int(file.metadata()["num_steps_done"]) >= 100  # twenty lines are ten reports of both SAEs
    steps: list[int] = []
    run(ended, steps.append)
    assert steps[0] >= 100
    sae = "width_48_sparsity_0.01_seed_0/sae.safetensors"
    assert (ended.out / sae).read_bytes() == (undisturbed.out / sae).read_bytes()


def test_a_finished_bank_is_not_trained_again(shards, tmp_path):
    config = bank(shards, tmp_path)
    heard: list[int] = []
    run(config)
    before = tree(tmp_path)
    run(config, heard.append)
    assert tree(tmp_path) == before
    assert heard == [config.steps]


def test_a_checkpoint_left_by_a_kill_behind_the_last_sae_is_taken_away(shards, tmp_path):
    config = bank(shards, tmp_path)
    run(config)
    assert is_finished(config)
    before = tree(tmp_path)
    checkpoint_path(config).write_bytes(b"left over")
    assert not is_finished(config)
    run(config)
    assert tree(tmp_path) == before


def test_the_records_hold_what_is_needed_to_make_the_sae_again(shards, tmp_path):
    config = bank(shards, tmp_path)
    run(config)
    record = read_json(tmp_path / "width_32_sparsity_0.001_seed_0/sae.json")
    assert (record["site"], record["layer"], record["d_in"], record["width"], record["steps"]) == ("mlp_out", 1, D_IN, 32, STEPS)
    assert SaeConfig.model_validate(record["config"]) == config.saes[0]


def test_saes_of_another_recipe_are_not_taken_for_ours(shards, tmp_path):
    run(bank(shards, tmp_path))
    other = SaeConfig(width=32, sparsity_coefficient=1e-3, recipe=SaeRecipe(learning_rate=1e-4))
    with pytest.raises(ConfigError, match="other settings"):
        run(bank(shards, tmp_path, saes=(other,)))


def test_a_flipped_byte_in_a_shard_is_refused_by_name(shards, tmp_path):
    copy = tmp_path / "mlp_out/layer_1"
    copy.mkdir(parents=True)
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = shard_path(copy, 1)
    damaged = bytearray(shard.read_bytes())
    damaged[5000] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(DamagedData, match=shard.name):
        run(bank(copy, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("sae.json"))


def test_shards_that_are_not_there_are_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="did the stage before it finish"):
        run(bank(tmp_path / "nowhere", tmp_path / "out"))
