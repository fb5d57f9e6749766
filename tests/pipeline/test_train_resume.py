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

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.activations.stream.local import LocalSource
from everyscope.base.errors import ConfigError, DamagedData, DataError, StorageError
from everyscope.base.files import read_json
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.files import read_sae
from everyscope.sites.names import Site
from everyscope.train import checkpoint
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.run import checkpoint_path, is_finished, run
from everyscope.train.training_group import TrainingGroup, normalisation_for

ROWS, D_IN, BATCH, STEPS = 600, 12, 32, 400
RARE_CHECKPOINTS = TrainSettings(batch_rows=BATCH, checkpoint_steps=10**6, log_steps=10)
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


def group(shards: Path, out: Path, **changes) -> TrainConfig:
    preset = SaePreset(
        learning_rate=5e-3, learning_rate_warmup_steps=10, sparsity_warmup_steps=50, bandwidth=0.1, initial_threshold=0.1
    )
    saes = tuple(SaeConfig(width=width, sparsity_coefficient=c, preset=preset) for width, c in ((32, 1e-3), (48, 1e-2)))
    settings = TrainSettings(batch_rows=BATCH, checkpoint_steps=30, log_steps=10)
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
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".speed.json")
    }


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, config.model_dump_json()], env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_after_lines(config: TrainConfig, lines: int, sent: signal.Signals = signal.SIGKILL) -> int:
    """Run the training group in a process of its own, send it a signal once its metrics have so many lines; what it exits
    with."""
    child = start(config)
    log = config.out / f"group_{config.group_id}.metrics.jsonl"
    while child.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            child.send_signal(sent)
            break
        time.sleep(0.001)
    return child.wait()


def test_killed_training_ends_in_the_same_bytes(shards, tmp_path):
    torch.set_num_threads(1)
    undisturbed, killed = group(shards, tmp_path / "undisturbed"), group(shards, tmp_path / "killed")
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
    undisturbed, ended = group(shards, tmp_path / "undisturbed"), group(shards, tmp_path / "ended", settings=RARE_CHECKPOINTS)
    run(undisturbed)
    assert kill_after_lines(ended, 20, signal.SIGTERM) == 128 + signal.SIGTERM
    with safe_open(checkpoint_path(ended), "pt") as file:
        assert int(file.metadata()["num_steps_done"]) >= 100  # twenty lines are ten reports of both SAEs
    steps: list[int] = []
    run(ended, steps.append)
    assert steps[0] >= 100
    sae = "width_48_sparsity_0.01_seed_0/sae.safetensors"
    assert (ended.out / sae).read_bytes() == (undisturbed.out / sae).read_bytes()


@pytest.mark.parametrize("step", [STEPS - 1, STEPS])
def test_a_signal_at_the_last_steps_is_heard(shards, tmp_path, step):
    """Sent behind the question that the step asks, so that only the one behind the last step can hear it."""
    undisturbed, ended = group(shards, tmp_path / "undisturbed"), group(shards, tmp_path / "ended", settings=RARE_CHECKPOINTS)
    run(undisturbed)
    done = 0

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as leaving:
        run(ended, progress)
    assert leaving.value.code == 128 + signal.SIGTERM
    with safe_open(checkpoint_path(ended), "pt") as file:
        assert file.metadata()["num_steps_done"] == str(STEPS)
    run(ended)
    sae = "width_48_sparsity_0.01_seed_0/sae.safetensors"
    assert (ended.out / sae).read_bytes() == (undisturbed.out / sae).read_bytes()


@pytest.fixture
def hears_ctrl_c():
    """As at a terminal: test workers leave Ctrl-C to the process that started them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_saves_a_checkpoint_after_the_step_and_says_so_at_once(shards, tmp_path, capfd):
    config, done = group(shards, tmp_path, settings=RARE_CHECKPOINTS), 0

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        if done == 7:
            os.kill(os.getpid(), signal.SIGINT)
            assert "stopping after this step" in capfd.readouterr().err

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress)
    assert done == 7
    assert signal.getsignal(signal.SIGINT) is before
    heard: list[int] = []
    run(config, heard.append)
    assert heard[0] == 8


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_does_not_wait_for_the_step(shards, tmp_path):
    def progress(steps: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one came through")

    with pytest.raises(KeyboardInterrupt):
        run(group(shards, tmp_path), progress)


def test_a_flipped_bit_of_a_checkpoint_or_a_finished_sae_is_refused_by_name(shards, tmp_path):
    config = group(shards, tmp_path / "stopped", settings=RARE_CHECKPOINTS)
    assert kill_after_lines(config, 20, signal.SIGTERM) == 128 + signal.SIGTERM
    path = checkpoint_path(config)
    good = path.read_bytes()
    for place in (12, 200, len(good) // 2, len(good) - 3):  # header, metadata, a weight's mantissa, a second moment's
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"{path.name}.*run the same command again"):
            run(config)
    path.write_bytes(good)
    run(config)
    folder = config.out / "width_32_sparsity_0.001_seed_0"
    sae, _ = read_sae(folder)
    assert sae.d_sae == 32
    for name in ("sae.safetensors", "sae.json"):
        good = (folder / name).read_bytes()
        bad = bytearray(good)
        bad[len(good) // 2] ^= 1
        (folder / name).write_bytes(bad)
        with pytest.raises(DataError, match=rf"{folder.name}/{name}.*"):
            read_sae(folder)
        (folder / name).write_bytes(good)


def test_a_checkpoint_is_of_its_own_step_though_training_goes_on_while_it_is_written(shards, tmp_path, monkeypatch):
    config, moments = group(shards, tmp_path), []
    write = checkpoint.write_tensors

    def slow(path, tensors, metadata=None, **more):
        time.sleep(0.05)  # many steps of this training group
        if metadata and "num_steps_done" in metadata:
            moments.append((int(metadata["num_steps_done"]), {name: tensor.clone() for name, tensor in tensors.items()}))
        write(path, tensors, metadata, **more)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    run(config)
    assert [step for step, _ in moments] == list(range(30, STEPS, 30))
    for step, tensors in moments[:3]:
        source = LocalSource(shards)
        alone = TrainingGroup(config.saes, D_IN, normalisation_for(config.saes, source.statistics, config.max_norm), STEPS)
        for number in range(step):
            alone.step(source.batch(number, BATCH))
        assert all(torch.equal(tensors[name], tensor) for name, tensor in alone.tensors().items())


def test_a_checkpoint_that_could_not_be_written_ends_the_training(shards, tmp_path, monkeypatch):
    def full(*given, **more):
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(StorageError, match="full"):
        run(group(shards, tmp_path))


def test_a_finished_group_is_not_trained_again(shards, tmp_path):
    config = group(shards, tmp_path)
    heard: list[int] = []
    run(config)
    before = tree(tmp_path)
    run(config, heard.append)
    assert tree(tmp_path) == before
    assert heard == [config.steps]


def test_a_checkpoint_left_by_a_kill_behind_the_last_sae_is_taken_away(shards, tmp_path):
    config = group(shards, tmp_path)
    run(config)
    assert is_finished(config)
    before = tree(tmp_path)
    checkpoint_path(config).write_bytes(b"left over")
    assert not is_finished(config)
    run(config)
    assert tree(tmp_path) == before


def test_the_records_hold_what_is_needed_to_make_the_sae_again(shards, tmp_path):
    config = group(shards, tmp_path)
    run(config)
    record = read_json(tmp_path / "width_32_sparsity_0.001_seed_0/sae.json")
    assert (record["site"], record["layer"], record["d_in"], record["width"], record["steps"]) == ("mlp_out", 1, D_IN, 32, STEPS)
    assert SaeConfig.model_validate(record["config"]) == config.saes[0]


def test_saes_of_another_recipe_are_not_taken_for_ours(shards, tmp_path):
    run(group(shards, tmp_path))
    other = SaeConfig(width=32, sparsity_coefficient=1e-3, preset=SaePreset(learning_rate=1e-4))
    with pytest.raises(ConfigError, match="other settings"):
        run(group(shards, tmp_path, saes=(other,)))


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
        run(group(copy, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("sae.json"))


def test_shards_that_are_not_there_are_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="did the stage before it finish"):
        run(group(tmp_path / "nowhere", tmp_path / "out"))
