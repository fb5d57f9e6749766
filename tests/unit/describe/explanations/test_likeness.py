"""Likeness in the model's embedding: the space and Fisher's direction against their formulas, and planted latents found again."""

from collections.abc import Callable

import numpy as np
import pytest

from everyscope.describe.explanations.firings import Firings
from everyscope.describe.explanations.likeness import BATCH, RIDGE, Fit, Likeness
from everyscope.describe.explanations.offline import Ground, learn_labels, score_labels, windows_passing
from everyscope.describe.explanations.passages import LEARN, SCORE
from everyscope.describe.explanations.space import DECAY, DIMENSIONS


def alike(ground: Ground, seed: int, share: float) -> np.ndarray:
    """Where a token lies in a half space of the embedding, drawn by seed, that holds such a share of the kinds; bool [tokens]."""
    vectors = ground.traits.space.vectors
    product = vectors[:-1] @ np.random.default_rng(seed).standard_normal(vectors.shape[1])
    passes = np.append(product > np.quantile(product, 1 - share), False)
    return passes[ground.traits.space.neighbours["own"]]


def fit_of(ground: Ground, fires: np.ndarray) -> Fit:
    (fit,) = ground.likeness.fits([np.flatnonzero(fires & ground.is_learning)])
    assert fit is not None
    return fit


def test_training_tokens_are_white_in_the_space(ground: Ground):
    space = ground.traits.space
    own = space.vectors[space.neighbours["own"][ground.is_training]].astype(np.float64)
    assert abs(own.mean(0)).max() < 1e-4
    assert np.cov(own.T, bias=True) == pytest.approx(np.eye(own.shape[1]), abs=1e-3)


def test_neighbours_and_the_text_before_stay_in_their_document(ground: Ground):
    """Against a walk over the tokens one by one."""
    passages, space = ground.passages, ground.traits.space
    ctx, none = passages.input_ids.shape[1], len(space.tokens)
    document, mask = passages.document.ravel(), passages.mask.ravel()
    raw = space.vectors[:, : DIMENSIONS["near"]] * space.rarity[:, None]
    walked, total = np.zeros(space.near.shape), np.zeros(space.near.shape[1])
    for token in range(4 * ctx):
        follows = token % ctx > 0 and mask[token] and mask[token - 1] and document[token] == document[token - 1]
        before = space.neighbours["own"][token - 1] if follows else none
        assert space.neighbours["before"][token] == before
        assert not follows or space.neighbours["after"][token - 1] == space.neighbours["own"][token]
        total = DECAY * total + raw[before] if follows else np.zeros_like(total)
        walked[token] = total
    got, want = space.near[: 4 * ctx], walked[: 4 * ctx]
    scale = (got * want).sum() / (want * want).sum()
    assert got == pytest.approx(scale * want, abs=1e-4)


def test_the_direction_is_fishers(ground: Ground):
    """Solved in float64 from the z of every learning token."""
    fires = alike(ground, 0, 0.1)
    rule, space = fit_of(ground, fires).rule, ground.traits.space
    learn = ground.passages.tokens_of(LEARN)
    z, every = space.z(learn).astype(np.float64), space.slices
    covariance = np.cov(z.T, bias=True)
    covariance += RIDGE * np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    chosen = np.concatenate([np.arange(every[part].start, every[part].stop) for part in rule.parts])
    away = z[fires[learn]].mean(0) - z.mean(0)
    want = np.linalg.solve(covariance[np.ix_(chosen, chosen)], away[chosen])
    assert rule.parts[0] == "own"
    assert np.array_equal(np.flatnonzero(rule.direction), np.sort(chosen))
    assert rule.direction[chosen] == pytest.approx(want, rel=1e-3, abs=1e-3 * abs(want).max())


def test_the_threshold_is_the_best_of_all(ground: Ground):
    noisy = alike(ground, 1, 0.2) & (np.random.default_rng(2).random(ground.passages.input_ids.size) < 0.3)
    rule = fit_of(ground, noisy).rule
    tokens, begins = ground.learn.stretches(np.arange(len(ground.learn)))
    peaks = np.maximum.reduceat(ground.traits.space.z(tokens) @ rule.direction, begins)
    active = np.logical_or.reduceat(noisy[tokens], begins)

    def worth(threshold: float) -> float:
        return float((peaks[active] >= threshold).mean() - (peaks[~active] >= threshold).mean())

    assert worth(rule.threshold) >= max(map(worth, peaks.tolist())) - 2e-3  # tables and products differ in the last bits


def test_answers_by_tables_are_those_of_the_rule(ground: Ground):
    fit = fit_of(ground, alike(ground, 3, 0.1))
    every = np.arange(len(ground.check))
    assert np.array_equal(ground.peaks.answers(fit), windows_passing(fit.rule, ground.traits, ground.check, every))


def test_what_is_alike_is_found_in_tokens_never_seen(ground: Ground, plant: Callable[..., Firings]):
    """A latent that fires on hundreds of kinds of token: no short list holds them, and some are new on held-out documents."""
    fires = alike(ground, 4, 0.15)
    labels = learn_labels(ground, plant(fires), lambda _: None)
    (label,), (score,) = labels, score_labels(ground, plant(fires), labels)
    assert isinstance(label.rule, Likeness)
    assert label.label.startswith("tokens like `")
    assert label.kind == "word class"
    assert score.detection is not None
    assert score.detection.value > 0.8
    own, held_out = ground.traits.space.neighbours["own"], ground.passages.tokens_of(SCORE)
    new = held_out[~np.isin(own[held_out], own[ground.is_training])]
    assert len(new) > 20
    passed = label.rule.holds(ground.traits, new)
    assert passed[fires[new]].mean() > passed[~fires[new]].mean() + 0.3


def test_held_out_firings_change_no_rule_of_likeness(ground: Ground, plant: Callable[..., Firings]):
    fires = alike(ground, 4, 0.15)
    spoiled = fires.copy()
    spoiled[ground.passages.tokens_of(SCORE)] = False
    clean, other = (learn_labels(ground, plant(one), lambda _: None)[0] for one in (fires, spoiled))
    assert isinstance(clean.rule, Likeness)
    assert isinstance(other.rule, Likeness)
    assert clean.label == other.label
    assert np.array_equal(clean.rule.direction, other.rule.direction)


def test_every_latent_keeps_its_place_over_batches(ground: Ground, plant: Callable[..., Firings]):
    """More latents than are fitted at once, silent ones among them: each label is that of the latent by itself."""
    size = ground.passages.input_ids.size
    fires = [alike(ground, seed, 0.1) if seed % 3 else np.zeros(size, bool) for seed in range(BATCH + 5)]
    done: list[int] = []
    labels = {one.latent: one.label for one in learn_labels(ground, plant(*fires), done.append)}
    assert sum(done) == len(fires)
    assert sorted(labels) == [seed for seed in range(len(fires)) if seed % 3]
    for latent in (1, BATCH - 2, BATCH + 3):
        assert labels[latent] == learn_labels(ground, plant(fires[latent]), lambda _: None)[0].label
