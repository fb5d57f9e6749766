"""kill -9 in the middle of an evaluation, then the same command: the same bytes as without."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_scope import build_scope, tree_bytes

from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.run import PROGRESS_FILE, run
from everyscope.sites.names import Site

# Waits between batches, so that the kill falls into the middle on any machine.
PROGRAM = """
import sys, time
from pathlib import Path
from everyscope.evaluate import run
from everyscope.evaluate.config import EvaluateConfig
measure, pause = run.measure_batch, float(sys.argv[2])
def slowly(*arguments):
    time.sleep(pause)
    measure(*arguments)
run.measure_batch = slowly
run.run(EvaluateConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def start(config: EvaluateConfig, root: Path, pause: float) -> subprocess.Popen[bytes]:
    (root / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", PROGRAM, str(root / "config.json"), str(pause)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_at(process: subprocess.Popen[bytes], path: Path) -> None:
    """Kill `process` as soon as `path` is there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_evaluation_ends_with_the_same_bytes(tmp_path: Path):
    sites = (Site("attn_out", 1), Site("resid_post", 0))
    config = build_scope(tmp_path, sites).model_copy(update={"checkpoint_batches": 2})
    run(config)
    want = tree_bytes(config.out)
    assert len(want) == 2 * 2 * 2 + 2

    again = config.model_copy(update={"out": tmp_path / "again"})
    killed = start(again, tmp_path, 0.5)
    kill_at(killed, again.out / PROGRESS_FILE)
    assert not list(again.out.rglob("metrics.json"))
    resumed = start(again, tmp_path, 0)
    assert resumed.wait() == 0
    assert tree_bytes(again.out) == want


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_progress_file_costs_time_and_nothing_else(tmp_path: Path, content: bytes):
    config = build_scope(tmp_path, (Site("resid_post", 1),))
    config.out.mkdir()
    (config.out / PROGRESS_FILE).write_bytes(content)
    run(config)
    assert len(tree_bytes(config.out)) == 5
