"""A whole recipe on a tiny random model, from the command line: killed, resumed, run again, damaged."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

import everyscope
from everyscope.cli.main import main
from everyscope.run.find import find_recipe
from everyscope.run.pipeline import run_folder
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site

ROOT = Path(__file__).parents[2]
RECIPE = """
from everyscope.run.config import *
from everyscope.sites.names import SUBLAYERS
from everyscope.run.recipes.tiny import recipe as tiny

def recipe():
    return tiny().model_copy(update=dict(
        name="small",
        model=ModelConfig(name={model!r}),
        shape=ModelShape(num_layers=2, d_model=32, d_attention=48, num_parameters=150_000),
        text=TextConfig(source="files", paths=({text!r},), context=32, held_out_fraction=0.3),
        groups=(
            SaeGroup(
                sites=SUBLAYERS, widths=(48, 64), target_l0s=(4, 8), num_tokens=4096
            ),
        ),
        harvest=HarvestSettings(bucket_rows=1024, dtype="bfloat16", batch_blocks=8),
        train=TrainSettings(batch_rows=64, checkpoint_steps=8, log_steps=4),
        evaluate=EvaluateSettings(
            num_sequences=24, batch_blocks=4, checkpoint_batches=1, pca_rows=1024, uniformity_sequences=4, baseline_sequences=4
        ),
        compare=CompareSettings(slices=("widths", "splitting", "precision"), num_sequences=4, splitting_sequences=8),
        instruction_tuned=None,
        random_weights=Control(
            model=ModelConfig(name={model!r}, weights="random"),
            groups=(
                SaeGroup(
                    sites=("mlp_out",), layers=(1,), widths=(48,), target_l0s=(8,), num_tokens=2048
                ),
            ),
        ),
        describe=DescribeSettings(num_sequences=24, batch_blocks=4),
        explain=ExplainSettings(num_sequences=12, num_held_out_sequences=12, batch_blocks=4, saes_per_pass=24),
    ))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_random_model_folder) -> Path:
    """A recipe file over some of the library's own files."""
    folder = tmp_path_factory.mktemp("recipe")
    text = folder / "text"
    text.mkdir()
    for module in (json, signal, subprocess, os, time, np):
        source = Path(getattr(module, "__file__", None) or subprocess.__file__).read_text()
        for number in range(0, min(len(source), 12_000), 1500):
            (text / f"{module.__name__}_{number}.txt").write_text(source[number : number + 1500])
    path = folder / "small.py"
    path.write_text(RECIPE.format(model=str(tiny_random_model_folder), text=str(text)))
    return path


def command(recipe: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "everyscope", "run", str(recipe), "--out", str(out), *flags]


def start(recipe: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(recipe, out, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below, but for those that tell how long something took."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "cost.json" and not path.name.endswith(".speed.json")
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    child = start(recipe, out, "--json")
    text, errors = child.communicate()
    assert child.returncode == 0, errors
    assert len(json.loads(text)["saes"]) == 24
    return out


FEW = {
    "shards/*/*/shard_00002.safetensors": signal.SIGKILL,
    "train/*/*/group_*.safetensors": signal.SIGTERM,
    "scores/*progress*": signal.SIGKILL,
    "descriptions/codes*/*": signal.SIGKILL,
}
ALL = {
    "shards/*/*/shard_00002.safetensors": signal.SIGKILL,
    "train/*/*/group_*.safetensors": signal.SIGTERM,
    "train/*/*/*/sae.json": signal.SIGKILL,
    "scores/*progress*": signal.SIGKILL,
    "scores/slices/*.json": signal.SIGKILL,
    "descriptions/codes*/*": signal.SIGKILL,
    "descriptions/*/*/*/explanations.parquet": signal.SIGTERM,
    "suite/*/*/*/*/params.npz": signal.SIGKILL,
}
"""Files that a run comes to, in this order, and how it is stopped when the first of them is there."""


def is_there(out: Path, moment: str) -> bool:
    """Whether some file has that name; folders may vanish while they are looked through."""
    try:
        return any(out.glob(moment))
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("moments", [pytest.param(FEW, id="few"), pytest.param(ALL, id="all", marks=pytest.mark.thorough)])
def test_killed_at_every_stage_the_same_command_ends_in_the_same_bytes(recipe, finished, tmp_path, moments):
    """One run, killed over and over: each time it gets a stage further."""
    out = tmp_path / "run"
    for moment, sent in moments.items():
        child = start(recipe, out)
        while child.poll() is None and not is_there(out, moment):
            time.sleep(0.002)
        assert child.poll() is None, f"the run ended before {moment} was there: {child.communicate()}"
        child.send_signal(sent)
        _, errors = child.communicate()
        if sent == signal.SIGTERM:
            assert child.returncode == 128 + signal.SIGTERM
            assert errors.splitlines()[-1] == "everyscope: asked to stop; run the same command to resume"
    last = start(recipe, out)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    want, got = tree(finished), tree(out)
    assert sorted(got) == sorted(want)
    assert [name for name in want if want[name] != got[name]] == []


def test_typed_again_it_changes_nothing(recipe, finished):
    """In a fresh interpreter, as a user starts it; all others here are forked (tests/forked.py)."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    child = forked.RealPopen(command(recipe, finished), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    table, errors = child.communicate()
    assert child.returncode == 0, errors
    assert "average_l0" in table
    rewritten = {"recipe.json", ".lock"}
    assert [path.name for path, when in before.items() if path.stat().st_mtime_ns != when and path.name not in rewritten] == []


def test_a_published_sae_reconstructs_raw_activations(recipe, finished, tiny_random_model_folder):
    suite = everyscope.load_suite(finished / "suite")
    assert len(suite) == 24
    model = load_language_model(ModelConfig(name=str(tiny_random_model_folder))).model
    input_ids = torch.arange(60).view(2, 30) + 6
    for entry in suite:
        site = Site(entry.site.kind, entry.site.layer)
        x = capture(model, [site], input_ids)[site]
        sae = entry.sae()
        assert sae(x).shape == x.shape
        arrays = np.load(entry.folder / "params.npz")
        f = np.maximum(x.numpy() @ arrays["W_enc"] + arrays["b_enc"], 0)
        f *= f > arrays["threshold"]
        np.testing.assert_allclose(sae(x).numpy(), f @ arrays["W_dec"] + arrays["b_dec"], rtol=1e-4, atol=1e-4)


def test_verify_finds_it_whole_and_names_a_flipped_byte(finished):
    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "everyscope", "verify", str(finished)], capture_output=True, text=True)

    assert verify().returncode == 0
    shard = next((finished / "shards").rglob("shard_00001.safetensors"))
    original = shard.read_bytes()
    shard.write_bytes(original[:-3] + bytes([original[-3] ^ 4]) + original[-2:])
    try:
        result = verify()
    finally:
        shard.write_bytes(original)
    assert result.returncode == 1
    assert str(shard.relative_to(finished)) in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("everyscope:")] == result.stderr.splitlines()[-1:]


def test_the_comparison_with_saelens_runs_up_to_saelens(finished, tmp_path, monkeypatch):
    """benchmarks/agreement.py, with a stand-in for what is in another environment."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    agreement = importlib.import_module("agreement")
    names = (*agreement.SAME, *agreement.CONVENTIONS)

    def stand_in(config, held_out, targets, cache, work) -> dict:
        return {"versions": {"sae-lens": "0"}, "metrics": {target.place: dict.fromkeys(names, 0.5) for target in targets}}

    monkeypatch.setattr(agreement, "ask_saelens", stand_in)
    found = agreement.compare(finished, 8, 4, tmp_path / "cache", tmp_path)
    agreement.show(found)
    assert [row["metric"] for row in found["rows"]] == list(names) * 4
    assert all(np.isfinite(row["everyscope_by_their_convention"]) for row in found["rows"])


def test_pages_are_timed_while_the_model_steers(finished, tmp_path, monkeypatch):
    """benchmarks/browsing.py, whose first request is that of another site's page: it is refused, and no model is loaded."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    browsing = importlib.import_module("browsing")
    monkeypatch.setattr(sys, "argv", ["browsing.py", str(finished), "--quick", "--out", str(tmp_path)])
    browsing.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["steered"] >= 1
    assert {(row["steering"], row["what"]) for row in found["rows"]} >= {(is_on, "tab 3") for is_on in (False, True)}
    assert all(0 < row["p50"] <= row["p95"] <= row["max"] for row in found["rows"])


def test_the_example_writes_reconstructions_of_every_sae(finished, tiny_random_model_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("write_reconstructions")
    model = load_language_model(ModelConfig(name=str(tiny_random_model_folder)))
    monkeypatch.setattr(example, "load_language_model", lambda config: model)
    example.main(finished / "suite", tmp_path / "found.npz")
    arrays = np.load(tmp_path / "found.npz")
    assert len(arrays.files) == 2 * 24
    assert all(arrays[name].shape == arrays[f"{name}_hat"].shape for name in arrays.files if name.endswith("/x"))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--groups.0.layers", "0", "7"), "layers 0 to 1"),
        (("--shape.num-layers", "3"), "shape.num_layers=3, but"),
        (("--shape.d-attention", "32"), "set shape.d_attention=48"),
        (("--model.name", "/nowhere/model"), "/nowhere/model"),
        (("--text.paths", "/nowhere/text"), "/nowhere/text"),
        (("--text.context", "4096"), "text.context=4096"),
        (("--model.device", "cuda:9"), "cuda:9"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit) as caught:
        main(["run", str(recipe), "--out", str(tmp_path / "run"), *flags])
    assert caught.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("everyscope: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_empty_text_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SystemExit):
        main(["run", str(recipe), "--out", str(tmp_path / "run"), "--text.paths", str(tmp_path / "empty.txt")])
    assert "no text in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_second_run_in_the_same_folder_is_refused(recipe, tmp_path, capsys):
    config = find_recipe(str(recipe))
    with run_folder(config, tmp_path / "run"), pytest.raises(SystemExit) as caught:
        main(["run", str(recipe), "--out", str(tmp_path / "run")])
    assert caught.value.code == 1
    assert "in use by another run" in capsys.readouterr().err


def test_no_published_file_says_where_the_model_or_the_run_lies(finished, tiny_random_model_folder):
    for name, content in tree(finished / "suite").items():
        assert str(tiny_random_model_folder).encode() not in content, name
        assert str(finished).encode() not in content, name
