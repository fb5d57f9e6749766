"""What a run says of the time that is left."""

from everyscope.run.pipeline import Outlook

EXPECTED = {"harvest": 600.0, "train": 1200.0, "evaluate": 600.0}


def said(capsys, *events: tuple[str, float]) -> list[str]:
    times = iter([time for _, time in events])
    outlook = Outlook(EXPECTED, clock=lambda: next(times))
    for stage, _ in events:
        outlook.begin(stage)
    return capsys.readouterr().err.splitlines()


def test_a_stage_that_took_twice_its_price_doubles_the_rest(capsys):
    assert said(capsys, ("harvest", 0.0), ("train", 1200.0), ("evaluate", 2400.0)) == [
        "Stage 1 of 3, about 40 min left of the run",
        "Stage 2 of 3, about 60 min left of the run",
        "Stage 3 of 3, about 13 min left of the run",  # 2,400 s where 1,800 were planned
    ]


def test_a_stage_that_was_finished_before_says_nothing_of_the_others(capsys):
    assert said(capsys, ("harvest", 0.0), ("train", 0.5))[-1] == "Stage 2 of 3, about 30 min left of the run"


def test_a_stage_that_was_nearly_finished_corrects_the_rest_within_bounds(capsys):
    assert said(capsys, ("harvest", 0.0), ("train", 5.0))[-1] == "Stage 2 of 3, about 10 min left of the run"  # a third of 30


def test_without_a_plan_only_the_stage_is_named(capsys):
    Outlook(dict.fromkeys(EXPECTED, 0.0)).begin("evaluate")
    assert capsys.readouterr().err == "Stage 3 of 3\n"
