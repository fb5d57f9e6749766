"""Kernels fit an H100, which ptxas can say on any machine: they are compiled for sm_90, in a process where Triton does not
interpret."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from everyscope.sae.kernels.gpu_triton import blocks, columns_of, row_of_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernels_sm90.py"
REAL_SIZES = (512, 576, 640, 768, 1024, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 5376, 6144, 8192)
"""d_in of models that people train SAEs on."""


@pytest.mark.parametrize("d_in", REAL_SIZES)
@pytest.mark.parametrize("num_bytes", [2, 4])
def test_threads_side_by_side_just_cover_the_columns_and_little_is_masked(d_in, num_bytes):
    columns, warps = columns_of(d_in, num_bytes)
    assert columns == 32 * warps * (16 // num_bytes)
    assert blocks(d_in, columns) * columns <= 4 / 3 * d_in


@pytest.mark.parametrize("d_in", [3, 100, *REAL_SIZES])
def test_a_program_holds_a_row_at_32_columns_a_thread_at_most(d_in):
    tile, warps, pairs = row_of_threads(d_in)
    assert d_in <= tile < max(256, 2 * d_in)
    assert tile // (32 * warps) <= 32
    assert tile * pairs // (32 * warps) <= 128


def test_sums_over_pairs_stay_within_threads_and_rows_within_registers():
    command = [sys.executable, str(BENCHMARK), "--json", "--d-in", "2304", "--recipes", "gemma_scope"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", "_decode", "_update"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {(row["precision"], row["name"]): row for row in map(json.loads, done.stdout.splitlines())}
    exact = found["float32", "_decode"]
    assert (exact["spilled"], exact["barriers"]) == (0, 2)  # both of the one sum over columns, at the end
    assert exact["shared"] <= 64
    decode, update = found["bfloat16", "_decode"], found["bfloat16", "_update"]
    assert decode["spilled"] == 0
    assert decode["programs"] >= 8
    assert update["shared"] <= 8192
    assert (
        update["spilled"] <= 1200
    )  # of 255 registers; with eight pairs at a time more was spilled, and it took three times as long
    assert update["programs"] >= 2
