"""Metrics reach the sinks that were asked for, under names that group by metric; the packages are optional."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from everyscope.activations.stream.local import ArraySource
from everyscope.base.errors import MissingExtra
from everyscope.sae.config import SaeConfig
from everyscope.sites.names import Site
from everyscope.train.arrays import train_saes
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.run import train
from everyscope.train.sinks import opened_sinks, scalars

ROWS = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
CONFIGS = [SaeConfig(width=16, target_l0=3), SaeConfig(width=16, sparsity_coefficient=1e-3)]


class FakeWandb:
    """As much of wandb as is called; it keeps what it is told."""

    def __init__(self) -> None:
        self.run, self.started, self.rows, self.metrics, self.finished = None, [], [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return SimpleNamespace(log=self.rows.append, define_metric=self._define, finish=self._finish)

    def _define(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_sink_that_is_not_installed_says_how_to_install_it(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails, installed or not
    with pytest.raises(MissingExtra, match=rf"pip install 'everyscope\[{name}\]'"), opened_sinks(name, "run", {}, tmp_path):
        pass


def test_names_group_by_metric_and_leave_out_what_is_not_there():
    row = {"step": 3, "sae": "width_16_l0_3_seed_0", "l0": 2.5, "target_l0": None}
    assert scalars(row) == {"l0/width_16_l0_3_seed_0": 2.5}


def test_train_saes_reports_every_few_steps_and_at_the_end(wandb, tmp_path):
    saes = train_saes(ROWS, CONFIGS, num_tokens=700, batch_rows=100, report_to="wandb", report_folder=tmp_path, log_steps=3)
    assert [row["step"] for row in wandb.rows] == [3, 3, 6, 6, 7, 7]
    assert wandb.rows[-2]["l0/width_16_l0_3_seed_0"] == saes.losses[0].l0[-1]
    assert wandb.rows[-1]["reconstruction_loss/width_16_sparsity_0.001_seed_0"] == saes.losses[1].reconstruction[-1]
    assert wandb.rows[-1]["tokens/width_16_sparsity_0.001_seed_0"] == 700
    assert wandb.started[0]["project"] == "everyscope"
    assert wandb.started[0]["config"]["saes"][0]["target_l0"] == 3
    assert wandb.metrics == [("step", None), ("*", "step")]
    assert wandb.finished == 1


def test_a_run_that_is_open_already_is_used_and_stays_open(wandb, tmp_path):
    rows = []
    wandb.run = SimpleNamespace(log=rows.append)
    train_saes(ROWS, CONFIGS[0], num_tokens=700, batch_rows=100, report_to=["wandb"], report_folder=tmp_path, log_steps=7)
    assert len(rows) == 1
    assert (wandb.started, wandb.finished) == ([], 0)


def test_a_group_of_a_run_reports_the_lines_of_its_log(wandb, tmp_path):
    config = TrainConfig(
        site=Site("resid_post", 1),
        shards=tmp_path,
        saes=tuple(CONFIGS),
        num_tokens=700,
        settings=TrainSettings(batch_rows=100, log_steps=2, report_to=("wandb",)),
        out=tmp_path / "out",
    )
    train(config, ArraySource(ROWS), lambda steps: None)
    lines = next((tmp_path / "out").glob("*.metrics.jsonl")).read_text().splitlines()
    assert len(lines) == len(wandb.rows) == 8
    assert wandb.started[0]["name"].startswith("resid_post layer 1")
    assert wandb.finished == 1


def test_tensorboards_files_hold_the_losses(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is optional")
    saes = train_saes(
        ROWS, CONFIGS[0], num_tokens=700, batch_rows=100, report_to="tensorboard", report_folder=tmp_path, log_steps=1
    )
    read = events.EventAccumulator(str(tmp_path / "tensorboard" / "train_saes")).Reload()
    found = [(event.step, event.value) for event in read.Scalars("l0/width_16_l0_3_seed_0")]
    assert found == list(zip(range(1, 8), saes.losses[0].l0.tolist(), strict=True))
