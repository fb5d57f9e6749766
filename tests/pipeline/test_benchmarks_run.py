"""Every benchmark runs, at sizes at which its numbers mean nothing: what nobody runs stops running.

Not here: the other trainers and the sentence encoder, which are packages of gigabytes; benchmarks/agreement.py,
benchmarks/browsing.py and the examples, which need a finished run, are in test_whole_run.py.
"""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
ROWS = 64
"""Held-out rows."""


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *flags])
    module.main()


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def benchmark(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_training_and_its_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = np.random.default_rng(0).standard_normal((9192, 16), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    sizes = ["--width", "64", "--batch", "50", "--l0", "4", "--threads", "1", "--rounds", "2", "--steps", "1", "--settle", "1"]
    sizes += ["--quality", "--rows", "500", "--points", "2", "--set", "dense_autograd.learning_rate=1e-3"]
    where = ["--data", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    run(benchmark("training"), monkeypatch, "--only", "everyscope,dense_autograd", *sizes, *where)
    found = results(tmp_path / "out")
    assert [line["trainer"] for line in found["speed"]["summary"]] == ["everyscope", "dense_autograd"]
    assert {record["curve"][-1]["rows"] for record in found["quality"]["all"]} == {500}
    assert (tmp_path / "out" / "quality.svg").exists()


def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = ["--quick", "--readers", "1", "--only", "mmap,local,flight,remote,remote+any,handover"]
    run(benchmark("serving"), monkeypatch, *sizes, "--out", str(tmp_path / "out"), "--cache", str(tmp_path))
    found = results(tmp_path / "out")
    assert {line["way"] for line in found["rates"]["summary"]} == set(sizes[-1].split(","))
    assert min(line["amortisation"] for line in found["amortisation"]) >= 1


def test_harvest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(benchmark("harvest"), monkeypatch, "--quick", "--tokens", "2048", "--out", str(tmp_path))
    assert results(tmp_path)["rounds"][0]["whole"] > 0


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(benchmark("scaling"), monkeypatch, "--quick", "--workers", "2", "--out", str(tmp_path))
    found = results(tmp_path)
    assert all(line["agrees"] for line in found["sums"])
    assert {line["workers"] for line in found["harvest"]["summary"]} == {1, 2}


def test_alternatives(monkeypatch: pytest.MonkeyPatch):
    module = benchmark("alternatives")
    for name, size in {"BATCH": 64, "D_IN": 24, "WIDTH": 128, "L0": 5}.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes a compiler and half a minute
    run(module, monkeypatch, "--threads", "1", "--rounds", "1")


def test_activations_of_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = benchmark("activations")
    monkeypatch.setattr(module, "HELD_OUT_ROWS", ROWS)
    run(module, monkeypatch, "tiny", "--out", str(tmp_path), "--rows", "3000")
    rows = np.load(tmp_path / "tiny.npy")
    assert rows.shape == (3000, 128)
    assert np.isfinite(rows).all()
    assert (np.abs(rows).sum(1) > 0).all()


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="Triton interprets nothing here")
def test_training_on_a_gpu_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(benchmark("training_gpu"), monkeypatch, "--interpret", "--json")
    for row in json.loads(capsys.readouterr().out)["results"]:
        assert row["skipped"] == 0
        assert 0 < row["l0"] <= row["pairs_per_row"]
