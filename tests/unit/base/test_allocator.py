"""Blocks that a stage frees and takes again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from everyscope.base.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else False
torch.set_num_threads(1)


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def take():
    return float(torch.ones(1 << 24).sum())  # 64 MiB, more than glibc ever keeps by itself


for _ in range(8):  # holes come together until one is large enough
    take()
before = faults()
for _ in range(8):
    take()
print(kept, faults() - before)
"""


def faults_of(way: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's parameters")
def test_a_block_that_is_freed_and_taken_again_costs_no_page_faults():
    kept, faults = faults_of("kept")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert faults < 1000
    assert faults_of("plain")[1] > 50 * max(1, faults)  # 4 x 16,384 pages of 4 KiB
