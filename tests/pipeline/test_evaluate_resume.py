"""kill -9 in the middle of an evaluation, then the same command: the same bytes as without."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small_scope import build_scope, score_bytes

from everyscope.evaluate import baseline_sweep, sums
from everyscope.evaluate import run as run_module
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import COST_FILE
from everyscope.evaluate.run import PROGRESS_FILE, run
from everyscope.evaluate.scores import write_scores
from everyscope.evaluate.sums import State
from everyscope.sites.names import Site

# Waits between the batches of a sweep, so that the kill falls into the middle of it on any machine.
PROGRAM = """
import sys, time
from pathlib import Path
from everyscope.evaluate import baseline_sweep, run
from everyscope.evaluate.config import EvaluateConfig
pauses = {name: float(pause) for name, pause in (part.split("=") for part in sys.argv[2].split(","))}
def slowed(work, pause):
    def slowly(*arguments):
        time.sleep(pause)
        return work(*arguments)
    return slowly
run.measure_batch = slowed(run.measure_batch, pauses["saes"])
baseline_sweep._measure = slowed(baseline_sweep._measure, pauses["baselines"])
run.run(EvaluateConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def start(config: EvaluateConfig, root: Path, saes: float = 0, baselines: float = 0) -> subprocess.Popen[bytes]:
    (root / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", PROGRAM, str(root / "config.json"), f"saes={saes},baselines={baselines}"]
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


@pytest.mark.parametrize("saes_at_once", [None, 1])
def test_a_killed_evaluation_ends_with_the_same_bytes(tmp_path: Path, saes_at_once: int | None):
    """Killed twice: while SAEs are measured, and while baselines are."""
    sites = (Site("attn_out", 1), Site("resid_post", 0))
    config = build_scope(tmp_path, sites).model_copy(update={"checkpoint_batches": 2, "saes_at_once": saes_at_once})
    run(config)
    want = score_bytes(config.out)
    assert len([name for name in want if name.endswith(("metrics.json", "latents.parquet"))]) == 2 * 2 * 2

    again = config.model_copy(update={"out": tmp_path / "again"})
    kill_at(start(again, tmp_path, saes=0.5), again.out / PROGRESS_FILE)
    assert not list(again.out.rglob("metrics.json"))
    kill_at(start(again, tmp_path, baselines=0.5), again.out / baseline_sweep.PROGRESS_FILE)
    assert not list(again.out.rglob("metrics.json"))
    resumed = start(again, tmp_path)
    assert resumed.wait() == 0
    assert score_bytes(again.out) == want
    forwards = [json.loads((out / COST_FILE).read_text())["forwards"] for out in (config.out, again.out)]
    assert forwards[0] == forwards[1]


def test_a_run_that_lives_for_one_pass_at_a_time_gets_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped as soon as it has kept anything: each life does one SAE or baseline on one batch, and none does it in vain."""
    small = {"num_sequences": 6, "uniformity_sequences": 2, "baseline_sequences": 4, "checkpoint_batches": 100}
    config = build_scope(tmp_path, (Site("attn_out", 1), Site("resid_post", 0)), 20).model_copy(update=small)
    run(config)
    again, save, lives, kept = config.model_copy(update={"out": tmp_path / "again"}), State.save, 0, []

    def save_and_stop(self: State, path: Path) -> None:
        save(self, path)
        kept.append((path.name, self.batches, self.steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", save_and_stop)
    monkeypatch.setattr(sums, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(sums, "SAVE_SHARE", 0.0)
    while lives == len(kept):
        with suppress(KeyboardInterrupt):
            run(again)
        lives += 1
        assert lives < 100, kept
    batches, saes = range(2), range(4)  # of two and four blocks; two SAEs at each site
    of_saes = [places for name, *places in kept if name == PROGRESS_FILE]
    assert of_saes == [place for batch in batches for place in (*([batch, sae + 1] for sae in saes), [batch + 1, 0])]
    of_baselines = [places for name, *places in kept if name == baseline_sweep.PROGRESS_FILE]
    assert len(of_baselines) == len(kept) - len(of_saes) > 4 * 2  # at least a site's own figures and a dictionary, in two batches
    assert score_bytes(again.out) == score_bytes(config.out)
    costs = [json.loads((out / COST_FILE).read_text()) for out in (config.out, again.out)]
    assert costs[0]["forwards"] == costs[1]["forwards"]


@pytest.mark.parametrize("content", [b"", b"damaged"])
@pytest.mark.parametrize("name", [PROGRESS_FILE, baseline_sweep.PROGRESS_FILE])
def test_a_damaged_progress_file_costs_time_and_nothing_else(tmp_path: Path, content: bytes, name: str):
    config = build_scope(tmp_path, (Site("resid_post", 1),))
    run(config)
    want = score_bytes(config.out)
    again = config.model_copy(update={"out": tmp_path / "again"})
    again.out.mkdir()
    (again.out / name).write_bytes(content)
    run(again)
    assert score_bytes(again.out) == want


def test_progress_on_another_text_is_not_taken_up(tmp_path: Path):
    """A corpus that was changed in place: the sums of the old one are not mixed with those of the new."""
    config = build_scope(tmp_path, (Site("resid_post", 1),)).model_copy(update={"checkpoint_batches": 2})
    kill_at(start(config, tmp_path, saes=0.5), config.out / PROGRESS_FILE)
    for path in sorted(config.text.paths[0].iterdir())[::2]:
        path.write_text(path.read_text() + " more")
    run(config)
    fresh = config.model_copy(update={"out": tmp_path / "fresh"})
    run(fresh)
    assert score_bytes(config.out) == score_bytes(fresh.out)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_stop_between_the_sweeps_and_the_scores_changes_no_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int):
    """Behind the baselines, and behind the first SAE's scores: what was done is counted once, and not forgotten."""
    config = build_scope(tmp_path, (Site("resid_post", 1),)).model_copy(update={"shards": None})
    run(config)
    again, done = config.model_copy(update={"out": tmp_path / "again"}), 0

    def stopped(*given) -> None:
        nonlocal done
        if done == writes:
            raise KeyboardInterrupt
        done += 1
        write_scores(*given)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "write_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    run(again)
    costs = [json.loads((out / COST_FILE).read_text()) for out in (config.out, again.out)]
    for cost in costs:
        del cost["seconds"], cost["entries"], cost["identity"]
    assert costs[0] == costs[1]
    assert min(costs[0]["forwards"].values()) > 0
    assert score_bytes(again.out) == score_bytes(config.out)
