"""A harvest that is killed, at any moment and as often as you like, ends in the same bytes as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from everyscope.activations.shards.verify import verify_shards

DRIVER = Path(__file__).with_name("harvest_driver.py")


@pytest.fixture
def config(tmp_path: Path, tiny_random_model_folder: Path) -> dict:
    """Two sites, three buckets, a few batches each; the text ends before the tokens do."""
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("\n".join(f"value_{number}_{line} = {line}" for line in range(12)))
    sites = [{"kind": "attn_out", "layer": 0}, {"kind": "resid_post", "layer": 0}]
    return {
        "model": {"name": str(tiny_random_model_folder)},
        "text": {
            "source": "files",
            "paths": [str(tmp_path / f"{n}.txt") for n in range(9)],
            "context": 64,
            "held_out_fraction": 0.01,
        },
        "sites": sites,
        "num_tokens": 10**5,
        "bucket_rows": 250,
        "batch_blocks": 2,
        "dtype": "bfloat16",
    }


def drive(config: dict, base: Path, kills: int | list[list[int]], *, is_preloaded: bool) -> dict[str, int]:
    plan = json.dumps({"config": config, "base": str(base), "kills": kills, "is_preloaded": is_preloaded})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, str(DRIVER), plan], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_all_alike(base: Path, names: list[str]) -> None:
    want = tree(base / "undisturbed")
    verify_shards(base / "undisturbed")
    assert len([name for name in want if name.startswith("attn_out/layer_0/shard") and name.endswith(".safetensors")]) >= 3
    for name in names:
        got = tree(base / name)
        assert got.keys() == want.keys(), name
        assert [file for file in want if got[file] != want[file]] == [], name


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_kill_at_any_moment_leaves_no_trace(config, tmp_path, step):
    killed = drive(config, tmp_path / "out", step, is_preloaded=True)
    assert len(killed) > 50 // step
    assert list(killed.values()) == [1] * (len(killed) - 1) + [0]
    assert_all_alike(tmp_path / "out", list(killed))


def test_kills_upon_kills_leave_no_trace(config, tmp_path):
    killed = drive(config, tmp_path / "out", [[10, 4, 3, 6, 14, 0, 15, 1], [30, 2, 2, 12, 10]], is_preloaded=True)
    assert killed == {"000": 8, "001": 5}
    assert_all_alike(tmp_path / "out", list(killed))


def test_the_whole_command_resumes(config, tmp_path):
    killed = drive(config, tmp_path / "out", [[20, 5]], is_preloaded=False)
    assert killed == {"000": 2}
    assert_all_alike(tmp_path / "out", list(killed))
