"""Where a training's time goes: each second belongs to one part."""

import pytest

from everyscope.train import spending
from everyscope.train.spending import Spending, together


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spending.time, "perf_counter", lambda: now[0])
    return now


def spent_by(clock, waits, step, save):
    spent = Spending()

    def rows():
        for wait in waits:
            clock[0] += wait
            yield wait

    for _ in spent.waiting(rows()):
        with spent.on("steps"):
            clock[0] += step
        with spent.on("saving"):
            clock[0] += save
        spent.num_rows += 100
    return spent.as_json()


def test_shares_are_of_the_whole_time(clock):
    assert spent_by(clock, [1.0, 3.0], 5.0, 0.5) == {
        "rows": 200,
        "seconds": 15.0,
        "rows_per_second": 13.3,
        "shares": {"rows": 0.2667, "steps": 0.6667, "saving": 0.0667},
    }


def test_several_add_up_by_their_seconds(clock):
    both = together([spent_by(clock, [2.0], 2.0, 0.0), spent_by(clock, [0.0], 4.0, 0.0)])
    assert both == {"rows": 200, "seconds": 8.0, "rows_per_second": 25.0, "shares": {"rows": 0.25, "steps": 0.75, "saving": 0.0}}


def test_nothing_is_no_time():
    assert together([])["rows_per_second"] == 0
