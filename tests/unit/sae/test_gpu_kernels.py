"""The laws of tests/gpu/test_pairs_gpu.py, kept on a machine without a GPU: Triton interprets the kernels."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

LAWS = Path(__file__).parents[2] / "gpu" / "test_pairs_gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device, on which tests/gpu/test_pairs_gpu.py runs")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_keep_their_laws_in_the_interpreter():
    """In a process of its own, for Triton decides when it is first imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", str(LAWS), "-x", "-p", "no:cacheprovider", "-k", "not waits_for_the_device"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout, done.stdout
