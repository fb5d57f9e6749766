"""Several processes harvest into one folder, are killed, and go on; what they leave is what one alone writes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from everyscope.activations.shards.verify import verify_shards

DRIVER = Path(__file__).with_name("partition_driver.py")
NUM_SEEDS = int(os.environ.get("EVERYSCOPE_KILL_SEEDS", "1"))
TARGETS = [1800, 2300]
"""Rows to harvest at first, and to go on to."""


@pytest.fixture
def config(tmp_path: Path, tiny_random_model_folder: Path) -> dict:
    """Two sites; eight buckets of a few batches, and two more."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        lines = "\n".join(f"value_{number}_{line} = {line}" for line in range(14))
        (tmp_path / f"text/{number:02d}.txt").write_text(lines)
    return {
        "model": {"name": str(tiny_random_model_folder)},
        "text": {"source": "files", "paths": [str(tmp_path / "text")], "context": 64, "held_out_fraction": 0.01},
        "sites": [{"kind": "attn_out", "layer": 0}, {"kind": "resid_post", "layer": 1}],
        "bucket_rows": 220,
        "batch_blocks": 2,
        "dtype": "bfloat16",
    }


def drive(config: dict, base: Path, partitions: list[tuple[int, int]], kills: list[list[int]]) -> dict:
    plan = {"config": config, "base": str(base), "partitions": partitions, "kills": kills, "num_tokens": TARGETS}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, str(DRIVER), json.dumps(plan)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("count", [3])
def test_processes_side_by_side_write_what_one_writes(config, tmp_path, count):
    partitions = [(index, count) for index in range(count)]
    assert drive(config, tmp_path, partitions, [[]] * count) == {"killed": 0, "complaints": []}
    assert "tokens/shard_00009.json" in tree(tmp_path / "one")
    assert tree(tmp_path / "several") == tree(tmp_path / "one")
    verify_shards(tmp_path / "several")


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_processes_that_are_killed_at_random_leave_no_trace(config, tmp_path, seed):
    chance = random.Random(seed)
    kills = [[chance.randrange(30) for _ in range(4)] for _ in range(3)]
    outcome = drive(config, tmp_path, [(index, 3) for index in range(3)], kills)
    assert outcome["killed"] >= 6
    assert outcome["complaints"] == []
    assert tree(tmp_path / "several") == tree(tmp_path / "one")
    verify_shards(tmp_path / "several")


def test_processes_with_one_partition_are_refused_but_for_one(config, tmp_path):
    outcome = drive(config, tmp_path, [(0, 1)] * 3, [[]] * 3)
    assert all("another harvest is writing here; wait for it" in complaint for complaint in outcome["complaints"])
    assert tree(tmp_path / "several") == tree(tmp_path / "one")
