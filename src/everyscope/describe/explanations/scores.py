"""Balanced accuracy with an interval over documents.

Detection: is the latent active in this window? Fuzzing: are the marked tokens of this active window the ones on which it fires?
Balanced accuracy is the mean of the share of true cases that are called true and of false cases that are called false: the same
answer to all gives 0.5, however many of either there are.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

MIN_CASES = 5
"""Cases of each kind under which nothing is scored [windows]."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled scores between which an interval lies [%]."""


@dataclass(frozen=True)
class Score:
    """A balanced accuracy [1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """What was asked about one label, what was true, and what was answered."""

    truth: Bool[np.ndarray, " n"]
    answer: Bool[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    """The document each case is from."""

    def by_document(self, num_documents: int) -> Float[np.ndarray, "documents 4"]:
        """Per document: true cases called true, true cases, false cases called false, false cases [windows]."""
        return np.stack([np.bincount(self.document, column, num_documents) for column in self._columns], axis=1)

    def sums(self) -> Float[np.ndarray, " 4"]:
        """The same over all documents."""
        return np.array([column.sum() for column in self._columns], np.float64)

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return (self.truth & self.answer, self.truth, ~self.truth & ~self.answer, ~self.truth)


def resampling_weights(is_drawn: Bool[np.ndarray, " documents"], draws: int, seed: int) -> Float[np.ndarray, "draws documents"]:
    """How often each document is in each resampling: as many as there are to be drawn from, with replacement, no others."""
    count = int(is_drawn.sum())
    weights = np.zeros((draws, len(is_drawn)))
    weights[:, is_drawn] = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / max(count, 1)), size=draws)
    return weights


def balanced_accuracy_of_sums(sums: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch"]:
    """From summed columns of `by_document`; NaN where a kind of case is missing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 0.5 * (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3])


def score(answers: Answers, weights: Float[np.ndarray, "draws documents"]) -> Score | None:
    """The balanced accuracy and its interval under `resampling_weights`; None where there are too few cases of a kind.

    A resampling that holds no case of one kind has no balanced accuracy and is left out of the interval.
    """
    if min(int(answers.truth.sum()), int((~answers.truth).sum())) < MIN_CASES:
        return None
    by_document = answers.by_document(weights.shape[1])
    value, resampled = float(balanced_accuracy_of_sums(by_document.sum(0))), balanced_accuracy_of_sums(weights @ by_document)
    low, high = np.percentile(resampled[~np.isnan(resampled)], INTERVAL) if not np.isnan(resampled).all() else (value, value)
    return Score(value, float(low), float(high))
