"""Several processes train what one trains; one of them killed changes nothing but the time.

Sums over ranks come in another order than one process's, so parameters differ in their last bits: by some 1e-7 of themselves a
step, which Adam carries on. They are compared after 200 steps by the distance that they have moved. A pre-activation within
rounding of its threshold would decide otherwise and part by a whole latent's step; at these seeds none does.
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline.parallel_driver import CHECKPOINT_STEPS, D_IN, MESHES, ROWS, SAES, SCALE, STEPS, train_on_every_mesh, training_group

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.sae.files import TENSOR_FILE, read_sae
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import fold, new_sae
from everyscope.train.checkpoint import find_checkpoint, folder_of_ranks
from everyscope.train.config import TrainConfig, sae_name
from everyscope.train.launch import launch
from everyscope.train.run import checkpoint_path, is_finished, run

TOLERANCE = 1e-5
"""Of the distance moved: some ten times what one process's own steps lose to rounding, pairs against dense."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "mlp_out/layer_1"
    random = np.random.default_rng(0)
    with new_activation_shard(shard_path(folder, 0), "mlp_out layer 1", ROWS, D_IN, "float32", 16, {}) as writer:
        rows = random.normal(0.0, SCALE / D_IN**0.5, (ROWS, D_IN)) * random.uniform(1, 2, (ROWS, 1))
        writer.put(torch.from_numpy(rows.astype(np.float32)), np.arange(ROWS), np.arange(ROWS), np.ones(ROWS, np.int64))
    seal_folder(folder, 1, site="mlp_out/layer_1", config={}, parents={}, version="0")
    return folder


def trained_bytes(config: TrainConfig) -> list[bytes]:
    return [(config.out / sae_name(sae) / TENSOR_FILE).read_bytes() for sae in config.saes]


def distances(config: TrainConfig, reference: TrainConfig) -> dict[str, float]:
    """Per tensor, how far two runs' SAEs lie apart, as a share of what the reference has moved since its first step."""
    found = {}
    for sae in config.saes:
        ours, record = read_sae(config.out / sae_name(sae))
        theirs = read_sae(reference.out / sae_name(sae))[0].tensors()
        start = fold(new_sae(sae, D_IN), Normalisation(record["scale"])).tensors()
        for name, tensor in ours.tensors().items():
            apart, moved = (tensor - theirs[name]).norm(), (theirs[name] - start[name]).norm()
            found[f"{sae_name(sae)} {name}"] = (apart / moved).item()
    return found


def at_step(step: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A progress that acts once, when so many steps are done."""
    left = step

    def progress(done: int) -> None:
        nonlocal left
        if left > 0 >= left - done:
            act()
        left -= done

    return progress


@pytest.fixture(scope="module")
def pair(shards, tmp_path_factory) -> TrainConfig:
    """The run of two shards, undisturbed."""
    config = training_group(shards, tmp_path_factory.mktemp("pair"), 2, 1)
    run(config)
    return config


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> TrainConfig:
    """One process's run."""
    torch.set_num_threads(1)
    config = training_group(shards, tmp_path_factory.mktemp("alone"))
    run(config)
    return config


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_what_one_process_trains(shards, alone, tmp_path, ranks):
    heard: list[int] = []
    launch(train_on_every_mesh, training_group(shards, tmp_path), ranks, heard.append)
    assert heard == [len(MESHES[ranks])]
    for latent_shards, replicas in MESHES[ranks]:
        config = training_group(shards, tmp_path / f"{latent_shards}_{replicas}", latent_shards, replicas)
        far = distances(config, alone)
        assert max(far.values()) < TOLERANCE, (latent_shards, replicas, far)
        assert config.group_id == alone.group_id
        log = config.out / f"group_{config.group_id}.metrics.jsonl"
        assert len(log.read_text().splitlines()) == len(SAES) * STEPS // 10
        assert is_finished(config)
        assert not folder_of_ranks(checkpoint_path(config)).exists()


def listening(pids: list[int]) -> list[str]:
    """Local addresses, in hexadecimal, of all sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes]


def test_a_killed_rank_changes_nothing_and_sockets_listen_on_loopback_alone(shards, pair, alone, tmp_path, capsys):
    killed, seen, heard = training_group(shards, tmp_path, 2, 1), [], []

    def kill() -> None:
        ranks = multiprocessing.active_children()
        seen.extend(listening([os.getpid(), *(rank.pid or 0 for rank in ranks)]))
        os.kill(next(rank.pid or 0 for rank in ranks if rank.name == "rank 1"), signal.SIGKILL)

    first = at_step(2 * STEPS // 5 + 3, kill)
    run(killed, lambda steps: (heard.append(steps), first(steps))[1])
    assert len(seen) >= 2
    assert set(seen) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert sum(heard) == STEPS
    assert capsys.readouterr().err.count("rank 1 was killed by signal 9; all 2 ranks resume from the last checkpoint") == 1
    assert trained_bytes(killed) == trained_bytes(pair)
    logs = [(each.out / f"group_{each.group_id}.metrics.jsonl").read_bytes() for each in (killed, pair)]
    assert logs[0] == logs[1]
    assert max(distances(killed, alone).values()) < TOLERANCE
    run(killed)
    assert trained_bytes(killed) == trained_bytes(pair)


def test_four_ranks_checkpoint_is_gone_on_from_by_one_and_by_two(shards, alone, tmp_path):
    def give_up() -> None:
        raise KeyboardInterrupt

    config = training_group(shards, tmp_path / "four", 2, 2)
    with pytest.raises(KeyboardInterrupt):
        run(config, at_step(STEPS // 2, give_up))
    assert not multiprocessing.active_children()
    kept = find_checkpoint(checkpoint_path(config))
    assert kept is not None
    assert len(kept.files) == 2
    assert kept.place.num_steps_done in range(CHECKPOINT_STEPS, STEPS, CHECKPOINT_STEPS)
    assert not is_finished(config)
    for latent_shards, replicas in ((1, 1), (2, 1)):
        other = training_group(shards, tmp_path / f"{latent_shards}_{replicas}", latent_shards, replicas)
        shutil.copytree(config.out, other.out)
        heard: list[int] = []
        run(other, heard.append)
        assert heard[0] == kept.place.num_steps_done
        assert max(distances(other, alone).values()) < TOLERANCE
        assert not folder_of_ranks(checkpoint_path(other)).exists()


def test_sigterm_keeps_what_is_done_and_all_ranks_leave_together(shards, pair, tmp_path):
    config = training_group(shards, tmp_path, 2, 1, checkpoint_steps=10**6)
    with pytest.raises(SystemExit) as left:
        run(config, at_step(STEPS // 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert left.value.code == 128 + signal.SIGTERM
    assert not multiprocessing.active_children()
    kept = find_checkpoint(checkpoint_path(config))
    assert kept is not None
    assert kept.place.num_steps_done >= STEPS // 3
    run(config)
    assert trained_bytes(config) == trained_bytes(pair)
