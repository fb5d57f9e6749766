"""kill -9 in the middle of a description, then the same command: the same bytes as without."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_description import build_description
from small_scope import tree_bytes

from everyscope.describe.config import DescribeConfig
from everyscope.describe.run import CODES_FOLDER, run
from everyscope.sites.names import Site

SITES = (Site("attn_out", 1), Site("mlp_out", 0))

# Waits between batches, or between SAEs, so that the kill falls into the middle on any machine.
PROGRAM = """
import sys, time
from pathlib import Path
from everyscope.describe import codes, run
from everyscope.describe.config import DescribeConfig
encode, write, pauses = codes.encode_rows, run.write_latents, [float(pause) for pause in sys.argv[2:]]
def encode_slowly(*arguments):
    time.sleep(pauses[0])
    return encode(*arguments)
def write_slowly(*arguments):
    time.sleep(pauses[1])
    write(*arguments)
codes.encode_rows, run.write_latents = encode_slowly, write_slowly
run.run(DescribeConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def start(config: DescribeConfig, root: Path, pauses: tuple[float, float]) -> subprocess.Popen[bytes]:
    (root / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", PROGRAM, str(root / "config.json"), *map(str, pauses)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    """Kill `process` as soon as it is time."""
    end = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_description_ends_with_the_same_bytes(tmp_path: Path, tiny_random_model_folder: Path):
    config = build_description(tmp_path, tiny_random_model_folder, SITES).model_copy(update={"saes_at_once": 3})
    run(config)
    want = tree_bytes(config.out)
    assert len(want) == 2 * 4 + 4

    again = config.model_copy(update={"out": tmp_path / "again"})
    codes = again.out / CODES_FOLDER
    collecting = start(again, tmp_path, (0.05, 0))
    kill_when(collecting, lambda: (codes / "portion_00001.safetensors").exists())
    assert not list(again.out.rglob("latents.parquet"))
    first = (codes / "portion_00000.safetensors").stat().st_mtime_ns
    writing = start(again, tmp_path, (0, 0.5))
    kill_when(writing, lambda: len(list(again.out.rglob("latents.parquet"))) == 2)
    assert (codes / "portion_00000.safetensors").stat().st_mtime_ns == first, "codes that were there were made again"
    finishing = start(again, tmp_path, (0, 0))
    assert finishing.wait() == 0
    assert tree_bytes(again.out) == want
