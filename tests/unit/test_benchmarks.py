"""The arithmetic of benchmarks/: what it says of trainers must be right before it is said."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
training = importlib.import_module("training")
worker = importlib.import_module("peers.worker")
everyscope_peer = importlib.import_module("peers.everyscope")
dense_peer = importlib.import_module("peers.dense_autograd")

D_IN = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("array") / "rows.npy"
    np.save(path, 3 * np.random.default_rng(0).standard_normal((worker.HELD_OUT_ROWS + 1000, D_IN), np.float32))
    knobs = {"coefficient": 1e-3, "learning_rate_warmup_steps": 0, "sparsity_warmup_steps": 0}
    return worker.Settings(data=str(path), width=64, batch=100, steps=4, l0=8, threads=1, seed=0, knobs=knobs, held_out=None)


def test_rows_are_scaled_to_unit_norm_and_none_is_both_trained_on_and_held_out(settings):
    rows = worker.Rows(settings.data)
    training_rows = torch.cat([rows.batch(step, 100) for step in range(10)])
    torch.testing.assert_close(training_rows.square().sum(1).mean(), torch.tensor(1.0))
    torch.testing.assert_close(
        torch.cat([training_rows, rows.held_out]) * rows.scale, torch.from_numpy(np.load(settings.data)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(rows.batch(10, 100), rows.batch(0, 100))


def test_the_threshold_lets_as_many_pass_as_asked_for():
    pre = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    for l0 in (1, 7.5, 20):
        assert (pre > worker.threshold_for(pre, l0)).sum() == l0 * 500


def test_fvu_is_0_for_the_identity_and_1_for_the_mean():
    rows = torch.randn(3000, D_IN, generator=torch.Generator().manual_seed(0)) + 5

    class Known:
        def __init__(self, x_hat, active):
            self.x_hat, self.active = x_hat, active

        def reconstruct(self, x):
            return self.x_hat(x), torch.tensor(self.active).expand(len(x), -1)

    identity = worker.evaluate(Known(lambda x: x, [1.0, 0.0, -1.0, 0.0]), rows)
    assert identity == {"l0": 2.0, "fvu": 0.0, "dead_fraction": 0.5}
    mean = worker.evaluate(Known(lambda x: rows.mean(0).expand_as(x), [0.0]), rows)
    assert mean["fvu"] == pytest.approx(1, abs=1e-6)


def test_the_baseline_takes_the_same_steps_as_everyscope(settings, monkeypatch):
    monkeypatch.setattr(everyscope_peer, "config_of", dense_peer.config_of)
    rows = worker.Rows(settings.data)
    ours, baseline = everyscope_peer.Everyscope(settings, rows), dense_peer.DenseAutograd(settings, rows)
    for step in range(3):
        ours.step(rows.batch(step, settings.batch))
        baseline.step(rows.batch(step, settings.batch))
    for name, parameter in ours.group.saes[0].parameters.items():
        # Adam without momentum turns a gradient near 0 into a step of up to the whole rate, so rounding shows where it is small.
        torch.testing.assert_close(parameter, baseline.parameters[name].detach(), rtol=1e-3, atol=2e-4)


def test_a_session_trains_steers_and_evaluates(settings):
    rows = worker.Rows(settings.data)
    settings = replace(settings, knobs={"learning_rate_warmup_steps": 0})
    session = worker.Session(settings, everyscope_peer.Everyscope(settings, rows), rows)
    assert len(session.answer({"steps": 2})["seconds"]) == 2
    session.answer({"set_l0": 8})
    assert session.answer({"evaluate": True})["l0"] == pytest.approx(8, rel=0.1)  # chosen on a quarter of the rows
    assert {name: len(times) for name, times in session.answer({"product": 3}).items()} == {"float32": 3, "bfloat16": 3}


def test_a_quality_run_is_measured_at_doubling_rows_and_at_its_end():
    assert training.milestones(524_288, 2048, 7) == [4, 8, 16, 32, 64, 128, 256]
    assert training.milestones(1000, 100, 9) == [1, 2, 5, 10]


def test_least_fvu_is_chosen_among_those_at_the_l0_and_else_the_nearest_l0():
    def run(trainer, l0, fvu):
        return {"trainer": trainer, "curve": [{"l0": l0, "fvu": fvu}]}

    met = [run("a", 49, 0.3), run("a", 52, 0.2), run("a", 90, 0.1)]
    missed = [run("b", 10, 0.5), run("b", 90, 0.1), run("b", 0, 1.0)]
    assert training.choose([*met, *missed], 50) == [met[1], missed[1]]


def test_ratios_are_taken_round_by_round():
    def record(trainer, number, seconds):
        times = {"float32": [0.5], "bfloat16": [0.25]}
        seconds = [seconds] * 3
        return {"trainer": trainer, "round": number, "seconds": seconds, "product_seconds": times, "peak_bytes": None, "l0": 50}

    records = [record("a", 0, 1.0), record("b", 0, 3.0), record("b", 1, 8.0), record("a", 1, 2.0)]
    first, second = training.summarise_speed(records, 100)
    assert (first["trainer"], first["ratio"], first["product_share"]["float32"]) == ("a", 1.0, 0.375)
    assert (second["trainer"], second["ratio"], second["ratio_range"]) == ("b", 3.5, [3.0, 4.0])


def test_knobs_are_parsed_and_combined():
    knobs = training.parse_knobs(["saelens.lr=1e-4,3e-4", "saelens.l0_coefficient=2"])
    assert training.combinations(knobs["saelens"]) == [{"lr": 1e-4, "l0_coefficient": 2.0}, {"lr": 3e-4, "l0_coefficient": 2.0}]
    with pytest.raises(SystemExit, match=r"TRAINER\.KNOB"):
        training.parse_knobs(["nobody.lr=1"])
