"""Probes find what was planted, know nothing of what is random, and count as a confusion matrix does."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everyscope.evaluate.comparisons import probes
from everyscope.evaluate.comparisons.config import ProbingConfig
from everyscope.evaluate.comparisons.probes import Task, balanced_accuracy, choose, columns, draw_rows, f1, tasks_of, verdicts
from everyscope.evaluate.comparisons.probing import Probed, dense_scores, sparse_scores

ROWS, FEATURES = 600, 12
DOCUMENT = np.arange(ROWS) // 20


def task(name: str, positive: torch.Tensor, test: torch.Tensor) -> Task:
    return Task(name, positive, test)


def features(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed)).relu()


def probed(tasks: list[Task], ks: tuple[int, ...]) -> Probed:
    config = ProbingConfig.model_construct(ks=ks, num_seeds=3, ridge=1e-3, resamples=200, level=0.95)
    return Probed(config, tasks, draw_rows(DOCUMENT, 3), DOCUMENT)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_a_planted_latent_is_found_and_tells_all():
    train, test = features(0), features(1)
    tasks = [task("planted", train[:, 5] > 0.5, test[:, 5] > 0.5), task("random", features(2)[:, 0] > 0, features(3)[:, 0] > 0)]
    found = sparse_scores(probed(tasks, (1, 3)), identity, FEATURES, train, test)
    assert found["planted", 1]["latents"] == [5]
    assert found["planted", 3]["latents"][0] == 5
    assert found["planted", 1]["accuracy"] > 0.97
    assert found["planted", 1]["f1"] > 0.97
    low, high = found["random", 1]["interval"]
    assert low < 0.5 < high
    assert abs(found["random", 3]["accuracy"] - 0.5) < 0.06
    low, high = found["planted", 1]["interval"]
    assert low <= found["planted", 1]["accuracy"] <= high


def test_two_features_tell_what_one_cannot_and_all_tell_no_less():
    train, test = features(0), features(1)
    both = [x[:, 2] + x[:, 9] > 0.9 for x in (train, test)]
    setting = probed([task("sum", *both)], (1, 2))
    found = sparse_scores(setting, identity, FEATURES, train, test)
    assert sorted(found["sum", 2]["latents"]) == [2, 9]
    assert found["sum", 2]["accuracy"] > found["sum", 1]["accuracy"] + 0.05
    assert dense_scores(setting, train, test)["sum"] > found["sum", 2]["accuracy"] - 0.02


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    train, chosen = features(0), torch.tensor([3, 1])
    tasks, drawn = [task("a", train[:, 5] > 0.5, train[:, 5] > 0.5)], draw_rows(DOCUMENT, 3)
    want = choose(identity, FEATURES, train, tasks, drawn, 4), columns(identity, FEATURES, train, chosen)
    monkeypatch.setattr(probes, "CHUNK_FEATURES", 7 * FEATURES)
    assert torch.equal(choose(identity, FEATURES, train, tasks, drawn, 4), want[0])
    assert torch.equal(columns(identity, FEATURES, train, chosen), want[1])
    assert_close(want[1], train[:, [3, 1]].T.double())


def test_features_are_chosen_by_mean_difference_on_the_drawn_rows_alone():
    x = torch.zeros(4, 3)
    x[:, 0], x[:, 1], x[:, 2] = torch.tensor([1.0, 0, 9, 0]), torch.tensor([0.0, 2, 0, 0]), torch.tensor([5.0, 5, 0, 0])
    positive = torch.tensor([True, False, True, False])
    first = torch.tensor([[True, True, False, False], [True, True, True, True]])
    got = choose(identity, 3, x, [task("a", positive, positive)], first, 3)
    assert got[0, 0].tolist() == [1, 0, 2]  # |1 - 0|, |0 - 2|, |5 - 5|
    assert got[1, 0].tolist() == [0, 1, 2]  # |5 - 0|, |0 - 1|, |2.5 - 2.5|


def test_draws_are_halves_of_documents():
    drawn = draw_rows(DOCUMENT, 4)
    assert drawn.sum(1).tolist() == [ROWS // 2] * 4
    assert len({tuple(rows.tolist()) for rows in drawn}) == 4
    for rows in drawn:
        whole = torch.bincount(torch.from_numpy(DOCUMENT), weights=rows.double())
        assert set(whole.tolist()) == {0.0, 20.0}
    assert draw_rows(np.zeros(5, int), 3).all()


def test_rare_labels_are_left_out():
    train, test = np.array([0, 0, 0, 1, -1, 1] * 10), np.array([0, 1, 1, -1, -1, 0] * 10)
    drawn = draw_rows(np.arange(60), 3)
    assert [its.name for its in tasks_of(("a", "b", "c"), train, test, drawn, 5)] == ["a", "b"]
    assert tasks_of(("a", "b", "c"), train, test, drawn, 40) == []


def test_verdicts_are_confusion_matrices_by_document():
    yes = torch.tensor([True, True, False, False, True, False])
    true = torch.tensor([True, False, True, False, True, True])
    counts = verdicts(yes, true, np.array([0, 0, 0, 0, 1, 1]))
    assert counts.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert float(balanced_accuracy(counts[0])) == 0.5
    assert float(f1(counts[0])) == 0.5
    assert float(balanced_accuracy(counts.sum(0))) == pytest.approx((2 / 4 + 1 / 2) / 2)
    always = torch.tensor([7.0, 0, 3, 0])
    assert float(balanced_accuracy(always)) == 0.5
