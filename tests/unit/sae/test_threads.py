"""Threads of the package compute within themselves and leave the caller's program as it was."""

import subprocess
import sys
import threading
from concurrent.futures import wait

import torch

from everyscope.sae.threads import single_threaded_pool

IN_TWO_THREADS = """
import threading
import numpy as np
import torch
import everyscope

def seen():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), found[0]

torch.set_num_threads(2)
before, during = seen(), []
rows = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
config = everyscope.SaeConfig(width=16, target_l0=3)
everyscope.train_saes(
    rows, config, num_passes=1, batch_rows=200, engine="ENGINE", callback=lambda step, losses: during.append(seen())
)
print(before, *during, seen())
"""


def test_training_leaves_torchs_threads_as_they_were():
    """In a process of its own: the count that later threads start with belongs to the whole process."""
    for engine in ("pairs", "dense"):
        code = IN_TWO_THREADS.replace("ENGINE", engine)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["(2,", "2)"] * 5


def test_each_thread_of_a_pool_has_one_of_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with single_threaded_pool(4) as pool:
            together = threading.Barrier(4)

            def count() -> tuple[int, int]:
                together.wait(timeout=60)  # so that each of the four is asked
                return threading.get_ident(), torch.get_num_threads()

            asked = [pool.submit(count) for _ in range(4)]
            wait(asked)
            found = [future.result() for future in asked]
        assert len({thread for thread, _ in found}) == 4
        assert {threads for _, threads in found} == {1}
        assert torch.get_num_threads() == 3
        with single_threaded_pool(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)
