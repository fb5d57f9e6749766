"""Intervals hold the truth as often as they say."""

import math

import numpy as np
import pytest
import torch

from everyscope.evaluate.bootstrap import Resampler, bootstrap_interval, student_quantile, widened_tail

EXPERIMENTS = 400


def ratio(sums: torch.Tensor) -> torch.Tensor:
    return sums[:, 0] / sums[:, 1]


@pytest.mark.parametrize(("num_documents", "level"), [(12, 0.95), (40, 0.95), (40, 0.8), (150, 0.95)])
def test_intervals_cover_at_the_stated_rate(num_documents: int, level: float):
    """Loss per token of documents of very different lengths, each with a mean of its own; the truth is 2 nats/token."""
    random = np.random.default_rng(7)
    hits = 0
    for experiment in range(EXPERIMENTS):
        lengths = np.ceil(random.lognormal(5, 0.7, num_documents))
        means = 2 + random.normal(0, 0.3, num_documents)
        totals = lengths * means + random.normal(0, 1, num_documents) * np.sqrt(lengths)
        table = torch.from_numpy(np.stack([totals, lengths], axis=1))
        interval = bootstrap_interval(table, ratio, resamples=500, level=level, seed=experiment)
        assert interval is not None
        hits += interval[0] <= 2 <= interval[1]
    error = math.sqrt(level * (1 - level) / EXPERIMENTS)
    assert abs(hits / EXPERIMENTS - level) < 3 * error  # three standard errors: one run in 370 would fall outside


def test_spread_of_a_mean_is_its_closed_form():
    """The mean of n equal documents has variance sum (x - mean)^2 / n^2 under resampling."""
    x = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = torch.stack([x, torch.ones_like(x)], dim=1)
    values = ratio(Resampler(60, 20_000, 0.95, 0).sums(table))
    want = float(((x - x.mean()).square().sum() / 60**2).sqrt())
    assert float(values.std()) == pytest.approx(want, rel=0.03)  # the standard deviation of 20,000 is good to 0.5 %


def test_resamples_keep_the_number_of_documents_and_follow_the_seed():
    table = torch.ones(9, 1)
    assert (Resampler(9, 300, 0.95, 0).sums(table) == 9).all()
    table = torch.arange(9.0)[:, None]
    assert torch.equal(Resampler(9, 300, 0.95, 1).sums(table), Resampler(9, 300, 0.95, 1).sums(table))
    assert not torch.equal(Resampler(9, 300, 0.95, 1).sums(table), Resampler(9, 300, 0.95, 2).sums(table))


@pytest.mark.parametrize(
    ("share", "freedom", "want"), [(0.975, 1, 12.7062), (0.975, 3, 3.18245), (0.95, 10, 1.81246), (0.975, 1000, 1.96234)]
)
def test_students_quantiles_are_those_of_the_tables(share: float, freedom: int, want: float):
    assert student_quantile(share, freedom) == pytest.approx(want, rel=1e-4)


def test_tails_are_widened_for_few_documents_and_left_for_many():
    assert widened_tail(0.025, 100_000) == pytest.approx(0.025, rel=1e-3)
    tails = [widened_tail(0.025, count) for count in (2, 5, 20, 100)]
    assert tails == sorted(tails)
    assert tails[-1] < 0.025


def test_one_document_or_an_undefined_ratio_has_no_interval():
    assert bootstrap_interval(torch.tensor([[1.0, 2.0]]), ratio) is None
    assert bootstrap_interval(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), ratio) is None
