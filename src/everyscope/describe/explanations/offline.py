"""The offline labeller: short rules from statistics of the training text. It needs no language model and no key.

A rule is chosen on one half of the training documents, must beat chance on the other half, and is scored on held-out
documents. Where none does, the label says so and names the commonest tokens instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from jaxtyping import Bool, Float, Int

from everyscope.describe.explanations.config import ExplainConfig
from everyscope.describe.explanations.firings import Firings, window_peaks
from everyscope.describe.explanations.likeness import BATCH, Fit, Likeness, LikenessSearch, Peaks
from everyscope.describe.explanations.passages import CHECK, LEARN, SCORE, Passages, Windows, cut_windows
from everyscope.describe.explanations.rules import Rule, RuleSearch
from everyscope.describe.explanations.samples import Sample, draw_sample, neighbours_of
from everyscope.describe.explanations.scores import Answers, Score, balanced_accuracy_of_sums, resampling_weights, score
from everyscope.describe.explanations.table import Explanation
from everyscope.describe.explanations.traits import Traits
from everyscope.describe.explanations.wording import kind_of, phrase_of, safe_label, shortened, tokens_with_shares
from everyscope.suite.latents import NO_RULE, RARE

METHOD = "offline statistics"
MIN_FIRINGS = 5
"""Firings in the learning half under which nothing is learnt [tokens]."""
CHECK_LOW = 0.58
"""What the lower end of a rule's interval must pass on the half it was not chosen on [1]."""
PLAIN_GAIN = 0.8
"""Gain from which on a rule of sets is not compared with one of likeness [1]."""
LIKENESS_PRICE = 0.02
"""What a rule of likeness must score above one of sets to be preferred: its label is the vaguer one [1]."""


@dataclass(frozen=True)
class Ground:
    """What the labels of all SAEs stand on: the text, its traits, its windows, the resamplings."""

    config: ExplainConfig
    passages: Passages
    traits: Traits
    search: RuleSearch
    likeness: LikenessSearch
    both: LikenessSearch
    """Over both halves of training: a rule of likeness that passed the check is fitted to all that there is."""
    peaks: Peaks
    """What rules of likeness say of the windows they are checked on."""
    is_learning: np.ndarray
    """True where a token is one that rules are learnt on; bool [tokens]."""
    is_training: np.ndarray
    """True where it is of either half of training; bool [tokens]."""
    learn: Windows
    check: Windows
    score: Windows
    check_weights: Float[np.ndarray, "draws documents"]
    """Resamplings of the documents on which rules are checked."""
    score_weights: Float[np.ndarray, "draws documents"]
    """Resamplings of the documents on which labels are scored."""


def lay_ground(config: ExplainConfig, passages: Passages, traits: Traits) -> Ground:
    """Everything that does not depend on an SAE."""
    size, tokens, training = config.window_tokens, passages.tokens_of(LEARN), np.flatnonzero(passages.is_training)
    learn, check, scored, both = (cut_windows(passages, parts, size) for parts in ((LEARN,), (CHECK,), (SCORE,), (LEARN, CHECK)))
    return Ground(
        config,
        passages,
        traits,
        RuleSearch(traits, tokens, learn, size),
        LikenessSearch(traits.space, tokens, learn),
        LikenessSearch(traits.space, training, both),
        Peaks.of(traits.space, check),
        passages.part == LEARN,
        passages.is_training,
        learn,
        check,
        scored,
        resampling_weights(passages.part_of_document == CHECK, config.bootstrap_draws, config.seed),
        resampling_weights(passages.part_of_document == SCORE, config.bootstrap_draws, config.seed),
    )


@dataclass(frozen=True)
class Labelled:
    """A latent with the rule behind its label."""

    latent: int
    label: str
    kind: str
    rule: Rule | Likeness | None
    """None where the label is no rule: in a language model's words, or where too little is known."""


def learn_labels(ground: Ground, firings: Firings, done: Callable[[int], None]) -> list[Labelled]:
    """A label for each latent that fires on training or held-out text; `done` is called with latents passed."""
    labels = []
    for start in range(0, firings.d_sae, BATCH):
        latents = [latent for latent in range(start, min(start + BATCH, firings.d_sae)) if len(firings.of(latent)[0])]
        learnt = [_fires(firings, latent, ground.is_learning) for latent in latents]
        fits = ground.likeness.fits([tokens for tokens, _ in learnt])
        found = [_rules(ground, firings, latent, *fires, fit) for latent, fires, fit in zip(latents, learnt, fits, strict=True)]
        liked = [latent for latent, (_, is_liked) in zip(latents, found, strict=True) if is_liked]
        trained = [_fires(firings, latent, ground.is_training)[0] for latent in liked]
        again = {
            latent: like
            for latent, tokens, fit in zip(liked, trained, ground.both.fits(trained), strict=True)
            if fit is not None and all((like := ground.both.named(fit, tokens)).named.values())  # else nothing could be said
        }
        for latent, (tokens, _), (rule, _) in zip(latents, learnt, found, strict=True):
            labels.append(_label(ground, latent, tokens, again.get(latent, rule)))
        done(min(BATCH, firings.d_sae - start))
    return labels


def _fires(firings: Firings, latent: int, chosen: Bool[np.ndarray, " tokens"]) -> tuple[np.ndarray, np.ndarray]:
    """Where a latent fires among some tokens, and how strongly."""
    tokens, activations = firings.of(latent)
    kept = chosen[tokens]
    return tokens[kept], activations[kept].astype(np.float64)


def _label(ground: Ground, latent: int, tokens: Int[np.ndarray, " n"], rule: Rule | Likeness | None) -> Labelled:
    """A latent's rule in words, or the tokens that it owns."""
    if len(tokens) < MIN_FIRINGS:
        label = f"rare: {len(tokens)} of {int(ground.is_learning.sum()):,} tokens"
        if len(tokens):
            label += f", {phrase_of(ground.search.distinctive(tokens)[0], ground.traits)}"
        return Labelled(latent, safe_label(label), RARE, None)
    if rule is not None:
        return Labelled(latent, phrase_of(rule, ground.traits), kind_of(rule), rule)
    owned, shares = ground.search.distinctive(tokens)
    return Labelled(latent, tokens_with_shares(owned, shares.tolist(), ground.traits), NO_RULE, owned)


def _rules(
    ground: Ground,
    firings: Firings,
    latent: int,
    tokens: Int[np.ndarray, " n"],
    activations: Float[np.ndarray, " n"],
    fit: Fit | None,
) -> tuple[Rule | None, bool]:
    """The best rule of sets, where it is clearly better than chance on documents that it was not learnt on, and whether that of
    likeness is, and is the better one there.
    """
    if len(tokens) < MIN_FIRINGS:
        return None, False
    found = ground.search.best(tokens, activations)
    sets = None if found is None else shortened(found.rule, ground.traits)
    checked = None if sets is None else _checked(ground, firings, latent, _check_answers(ground, sets))
    rule = sets if _beats_chance(checked) else None
    if fit is not None and (rule is None or found is None or found.gain <= PLAIN_GAIN):
        liked = _checked(ground, firings, latent, ground.peaks.answers(fit))
        if _beats_chance(liked) and (checked is None or liked.value > checked.value + LIKENESS_PRICE):
            return rule, True
    return rule, False


def _check_answers(ground: Ground, rule: Rule) -> Bool[np.ndarray, " windows"]:
    return windows_passing(rule, ground.traits, ground.check, np.arange(len(ground.check)))


def _checked(ground: Ground, firings: Firings, latent: int, answers: Bool[np.ndarray, " windows"]) -> Score | None:
    """Detection by some answers on the half of training that nothing was learnt on."""
    active, _ = window_peaks(firings, ground.check, latent)
    truth = np.zeros(len(ground.check), bool)
    truth[active] = True
    return score(Answers(truth, answers, ground.check.document), ground.check_weights)


def _beats_chance(checked: Score | None) -> TypeGuard[Score]:
    return checked is not None and checked.low > CHECK_LOW


def windows_passing(
    rule: Rule | Likeness, traits: Traits, windows: Windows, chosen: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which of the chosen windows hold a token that passes. This is what a rule answers to detection."""
    tokens, begins = windows.stretches(chosen)
    return _any(rule.holds(traits, tokens), begins)


def _any(passed: Bool[np.ndarray, " n"], begins: Int[np.ndarray, " windows"]) -> Bool[np.ndarray, " windows"]:
    return np.logical_or.reduceat(passed, begins) if len(begins) else np.zeros(0, bool)


def _half(passed: Bool[np.ndarray, " n"], lengths: Int[np.ndarray, " sets"]) -> Bool[np.ndarray, " sets"]:
    """Of which sets of marked tokens half or more pass. This is what a rule answers to fuzzing."""
    return np.add.reduceat(passed, np.cumsum(lengths) - lengths) * 2 >= lengths if len(lengths) else np.zeros(0, bool)


def _passing(rules: Sequence[Rule | Likeness], traits: Traits, tokens: np.ndarray) -> Iterator[Bool[np.ndarray, " n"]]:
    """Which tokens pass each rule; those of likeness are asked together."""
    alike = [rule for rule in rules if isinstance(rule, Likeness)]
    products = traits.space.z(tokens) @ np.stack([rule.direction for rule in alike], axis=1) if alike else np.zeros((0, 0))
    column = iter(range(len(alike)))
    for rule in rules:
        yield products[:, next(column)] >= rule.threshold if isinstance(rule, Likeness) else rule.holds(traits, tokens)


def samples_of(ground: Ground, firings: Firings, latents: Sequence[int], num_active: int, num_silent: int) -> dict[int, Sample]:
    """The windows on which each latent's label is judged."""
    neighbours = neighbours_of(firings, ground.score, latents)
    samples: dict[int, Sample] = {}
    active = {other: window_peaks(firings, ground.score, other)[0] for other in np.unique(neighbours).tolist()}
    for latent, near in zip(latents, neighbours.tolist(), strict=True):
        fire = np.zeros(len(ground.score), bool)
        for other in near:
            fire[active[other]] = True
        samples[latent] = draw_sample(firings, ground.score, latent, fire, num_active, num_silent, ground.config.seed)
    return samples


def score_labels(ground: Ground, firings: Firings, labels: Sequence[Labelled]) -> list[Explanation]:
    """Every label with its scores on held-out documents, beside those of other latents' labels on the same windows."""
    config, ruled = ground.config, [one for one in labels if one.rule is not None]
    samples = samples_of(ground, firings, [one.latent for one in ruled], config.active_windows, config.silent_windows)
    others = other_labels(len(ruled), config.null_labels, config.seed)
    found = [Explanation(one.latent, one.label, METHOD, one.kind) for one in labels if one.rule is None]
    for number, one in enumerate(ruled):
        sample = samples[one.latent]
        asked = [number, *others[number]]
        rules = [rule for other in asked if (rule := ruled[other].rule) is not None]
        tokens, begins = ground.score.stretches(sample.windows)
        marks = [*sample.right, *sample.wrong]
        lengths, order = np.array([len(one) for one in marks], np.int64), np.argsort(tokens)
        marked = order[np.searchsorted(tokens[order], np.concatenate(marks))] if marks else order[:0]
        passing = list(_passing(rules, ground.traits, tokens))
        detections = [detection_answers(ground, sample, _any(passed, begins)) for passed in passing]
        fuzzings = [fuzzing_answers(ground, sample, _half(passed[marked], lengths)) for passed in passing]
        found.append(explanation(one, METHOD, detections, fuzzings, ground.score_weights))
    return found


def detection_answers(ground: Ground, sample: Sample, answers: np.ndarray) -> Answers:
    """Answers (bool) about `sample.windows`, with the truth."""
    truth = np.arange(len(sample.windows)) < len(sample.active)
    return Answers(truth, answers, ground.score.document[sample.windows])


def fuzzing_answers(ground: Ground, sample: Sample, answers: np.ndarray) -> Answers:
    """Answers (bool) about the right marks, then the wrong ones, with the truth."""
    truth = np.arange(2 * len(sample.marked)) < len(sample.marked)
    return Answers(truth, answers, np.tile(ground.score.document[sample.marked], 2))


def explanation(
    label: Labelled, method: str, detections: Sequence[Answers], fuzzings: Sequence[Answers], weights: np.ndarray
) -> Explanation:
    """A label with its scores: of each sequence the first answers are its own, the others those of other latents' labels."""
    detection, fuzzing = score(detections[0], weights), score(fuzzings[0], weights)
    return Explanation(
        label.latent,
        label.label,
        method,
        label.kind,
        detection,
        _null(detections[1:]) if detection else None,
        fuzzing,
        _null(fuzzings[1:]) if fuzzing else None,
        len(detections[0].truth) if detection else 0,
    )


def _null(answers: Sequence[Answers]) -> float | None:
    """The mean balanced accuracy of others' labels, None where there are none."""
    values = [float(balanced_accuracy_of_sums(one.sums())) for one in answers]
    return float(np.mean(values)) if values else None


def other_labels(count: int, draws: int, seed: int) -> Int[np.ndarray, "count others"]:
    """For each of `count` labels, `draws` others (all, where there are fewer); every label is another's equally often."""
    order = np.random.default_rng(seed).permutation(count)
    others = np.empty((count, max(min(draws, count - 1), 0)), np.int64)
    for step in range(others.shape[1]):
        others[order, step] = np.roll(order, step + 1)
    return others
