from collections.abc import Callable

import numpy as np
import pytest

from everyscope.describe.explanations import samples
from everyscope.describe.explanations.firings import Firings, window_peaks
from everyscope.describe.explanations.offline import Ground, other_labels, samples_of, windows_passing
from everyscope.describe.explanations.passages import SCORE
from everyscope.describe.explanations.rules import OneOf, Rule
from everyscope.describe.explanations.samples import neighbours_of, stratified
from everyscope.describe.explanations.scores import Answers, balanced_accuracy_of_sums, resampling_weights, score


def answers(truth: list[int], answer: list[int], documents: list[int] | None = None) -> Answers:
    numbers = np.arange(len(truth)) % 4 if documents is None else np.array(documents)
    return Answers(np.array(truth, bool), np.array(answer, bool), numbers)


def activity_of(firings: Firings, ground: Ground) -> np.ndarray:
    """Which latent fires in which window, by hand; bool [latents, windows]."""
    fires = [np.isin(np.arange(len(ground.score.of_token)), firings.of(latent)[0]) for latent in range(firings.d_sae)]
    return np.array([[one[ground.score.tokens(number)].any() for number in range(len(ground.score))] for one in fires])


@pytest.mark.parametrize("says", [0, 1])
@pytest.mark.parametrize("share", [5, 30])
def test_the_same_answer_to_all_scores_one_half(says: int, share: int):
    truth = [1] * 10 + [0] * share
    found = score(answers(truth, [says] * len(truth)), resampling_weights(np.ones(4, bool), 100, 0))
    assert found is not None
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_balanced_accuracy_in_closed_form():
    case = answers([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1])
    assert balanced_accuracy_of_sums(case.sums()) == pytest.approx(0.5 * (3 / 4 + 1 / 2))
    assert np.array_equal(case.by_document(4).sum(0), case.sums())


def test_intervals_resample_documents_not_windows():
    """One document that is all wrong and many that are right: the interval is as wide as a draw of documents makes it."""
    truth = ([1] * 10 + [0] * 10) * 6
    answer = ([0] * 10 + [1] * 10) + ([1] * 10 + [0] * 10) * 5
    found = score(answers(truth, answer, np.repeat(np.arange(6), 20).tolist()), resampling_weights(np.ones(6, bool), 2000, 0))
    assert found is not None
    assert found.value == pytest.approx(5 / 6)
    assert found.low == pytest.approx(0.5, abs=0.01)  # three of six draws are the bad document
    assert found.high == 1.0


def test_only_documents_that_score_are_resampled():
    is_drawn = np.array([True, False, True, True, False])
    weights = resampling_weights(is_drawn, 500, 0)
    assert (weights[:, ~is_drawn] == 0).all()
    assert (weights.sum(1) == 3).all()
    assert weights.mean(0)[is_drawn] == pytest.approx(1, abs=0.15)


def test_too_few_cases_are_not_scored():
    assert score(answers([1] * 4 + [0] * 40, [1] * 44), resampling_weights(np.ones(4, bool), 10, 0)) is None


def test_every_label_is_another_ones_equally_often():
    others = other_labels(9, 4, seed=3)
    assert others.shape == (9, 4)
    assert all(number not in row and len(set(row)) == 4 for number, row in enumerate(others.tolist()))
    assert set(np.bincount(others.ravel(), minlength=9)) == {4}
    assert other_labels(1, 4, 0).shape == (1, 0)


def test_samples_are_what_they_say(ground: Ground, plant: Callable[..., Firings]):
    random = np.random.default_rng(0)
    size = ground.passages.input_ids.size
    base = random.random(size) < 0.02
    firings = plant(base, base & (random.random(size) < 0.5), random.random(size) < 0.01)
    activity = activity_of(firings, ground)
    for latent, sample in samples_of(ground, firings, [0, 1, 2], 20, 20).items():
        assert activity[latent, sample.active].all()
        assert not activity[latent, sample.silent].any()
        assert len(set(sample.windows.tolist())) == len(sample.windows) == 40
        tokens, _ = firings.of(latent)
        for number, right, wrong in zip(sample.marked, sample.right, sample.wrong, strict=True):
            inside = ground.score.tokens(number)
            assert np.array_equal(right, inside[np.isin(inside, tokens)])
            assert np.isin(wrong, inside).all()
            assert not np.isin(wrong, tokens).any()
            assert len(wrong) == min(len(right), len(inside) - len(right))
    again = samples_of(ground, firings, [1], 20, 20)[1]
    assert np.array_equal(again.windows, samples_of(ground, firings, [0, 1], 20, 20)[1].windows)


def test_scores_only_use_held_out_documents(ground: Ground, plant: Callable[..., Firings]):
    """Leak test: no document that a scorer sees is one that the explainer saw."""
    fires = np.random.default_rng(0).random(ground.passages.input_ids.size) < 0.02
    sample = samples_of(ground, plant(fires), [0], 40, 40)[0]
    scored = set(ground.score.document[sample.windows].tolist())
    explained = set(ground.learn.document.tolist()) | set(ground.check.document.tolist())
    assert scored
    assert not scored & explained
    assert (ground.passages.part_of_document[list(scored)] == SCORE).all()


def test_half_of_the_silent_windows_are_hard(ground: Ground, plant: Callable[..., Firings]):
    """Silent windows come from where co-firing latents fire, as far as there are such windows."""
    random = np.random.default_rng(0)
    size = ground.passages.input_ids.size
    both = random.random(size) < 0.01
    firings = plant(both, both | (random.random(size) < 0.01), *(random.random((8, size)) < 0.0005))
    activity = activity_of(firings, ground)
    near = neighbours_of(firings, ground.score, range(firings.d_sae))
    assert near[0, 0] == 1
    assert near[1, 0] == 0
    sample = samples_of(ground, firings, [0], 20, 20)[0]
    assert np.asarray(activity[near[0]].any(0))[sample.silent].sum() >= 10


def test_deciles_are_drawn_evenly():
    peaks = np.random.default_rng(0).permutation(100).astype(float)
    chosen = stratified(peaks, 20, np.random.default_rng(1))
    assert np.array_equal(np.bincount((peaks[chosen] // 10).astype(int)), np.full(10, 2))
    assert (np.diff(peaks[chosen]) < 0).all()
    assert len(stratified(peaks[:3], 20, np.random.default_rng(1))) == 3


def test_window_peaks_by_hand(ground: Ground, plant: Callable[..., Firings]):
    fires = np.random.default_rng(0).random(ground.passages.input_ids.size) < 0.05
    firings = plant(fires)
    tokens, activations = firings.of(0)
    want: dict[int, float] = {}
    for token, activation in zip(tokens.tolist(), activations.tolist(), strict=True):
        window = int(ground.score.of_token[token])
        if window >= 0:
            want[window] = max(want.get(window, 0.0), activation)
    got, peaks = window_peaks(firings, ground.score, 0)
    assert dict(zip(got.tolist(), peaks.tolist(), strict=True)) == want


def test_windows_passing_by_hand(ground: Ground):
    rule = Rule(((OneOf("token", (4, 7)),),))
    values, windows = ground.traits.families["token"].values, ground.score
    want = [bool(np.isin(values[windows.tokens(number)], (4, 7)).any()) for number in range(len(windows))]
    assert windows_passing(rule, ground.traits, windows, np.arange(len(windows))).tolist() == want


def test_neighbours_by_hand(ground: Ground, plant: Callable[..., Firings], monkeypatch: pytest.MonkeyPatch):
    """By cosine over all windows, whatever the chunks."""
    random = np.random.default_rng(5)
    size = ground.passages.input_ids.size
    common = random.random(size) < 0.02
    shares = np.linspace(0.1, 1, 12)
    firings = plant(*((common | (random.random(size) < 0.01)) & (random.random(size) < share) for share in shares))
    active = activity_of(firings, ground).astype(float)
    cosines = active @ active.T / np.sqrt(np.outer(active.sum(1), active.sum(1))) - 9 * np.eye(12)
    want = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    monkeypatch.setattr(samples, "NEIGHBOUR_WINDOWS", 10**6)
    for chunk in (5, 100):
        monkeypatch.setattr(samples, "CHUNK_LATENTS", chunk)
        assert np.array_equal(neighbours_of(firings, ground.score, range(12)), want)
    assert np.array_equal(neighbours_of(firings, ground.score, [7, 2]), want[[7, 2]])
