"""The arithmetic of benchmarks/scaling.py."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
scaling = importlib.import_module("scaling")


def test_what_is_left_of_a_worker_is_measured_against_one_with_as_many_threads():
    rates = {(1, 2): (150.0, 160.0), (1, 1): (100.0, 100.0), (2, 1): (180.0, 160.0)}
    records = [
        {"round": number, "workers": workers, "threads": threads, "units_per_second": rate}
        for (workers, threads), found in rates.items()
        for number, rate in enumerate(found)
    ]
    alone, all_threads, two = scaling.summarise(records)
    assert (alone["workers"], alone["threads"], alone["left"]) == (1, 1, 1.0)
    assert (all_threads["threads"], all_threads["ratio"]) == (2, 1.0)
    assert (two["left"], two["left_range"]) == (pytest.approx(0.85), [0.8, 0.9])
    assert two["ratio_range"] == [1.0, 1.2]


def test_partitions_and_groups_of_all_workers_are_the_whole(monkeypatch, tmp_path):
    options = scaling.parse(["--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(scaling, "harvest", lambda config: None)
    trained = []
    monkeypatch.setattr(scaling, "train", trained.append)
    whole = scaling.harvest_part(tmp_path, options, 0, 1)
    assert whole == 3 * options.tokens
    assert sum(scaling.harvest_part(tmp_path, options, index, 2) for index in range(2)) == whole
    units = sum(scaling.train_part(tmp_path, tmp_path, options, index, 2) for index in range(2))
    assert units == 3 * 6 * options.tokens
    assert len({group.site for group in trained}) == len(trained) == 3


def test_flags_that_mean_nothing_are_refused(capsys):
    for flags in (["--only", "abacus"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            scaling.parse(flags)
    assert "no such part" in capsys.readouterr().err
