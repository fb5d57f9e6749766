"""The fit is exact: closed forms, the gradient at the minimum, and what must not change it."""

import math

import pytest
import torch
from torch.testing import assert_close

from everyscope.base.errors import DataError
from everyscope.evaluate.comparisons.probes import fit_probe


def rows(num: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, k, generator=generator, dtype=torch.float64) * torch.arange(1, k + 1)
    noise = torch.randn(num, generator=generator, dtype=torch.float64)
    return x, x @ torch.linspace(1, -1, k, dtype=torch.float64) + noise > 0.3


def test_one_binary_feature_gives_the_log_odds():
    # where x is 1: 30 of 40 positive; where it is 0: 10 of 60. Classes weigh one half each: 40 positives, 60 negatives.
    x = torch.cat([torch.ones(40), torch.zeros(60)])[:, None]
    y = torch.cat([torch.arange(40) < 30, torch.arange(60) < 10])
    probe = fit_probe(x, y, ridge=1e-12)
    at_zero, at_one = math.log((10 / 40) / (50 / 60)), math.log((30 / 40) / (10 / 60))
    assert float(probe.bias) == pytest.approx(at_zero, abs=1e-6)
    assert float(probe.weight) == pytest.approx(at_one - at_zero, abs=1e-6)


def test_the_gradient_vanishes_at_the_fit():
    x, y = rows(300, 4)
    ridge = 0.01
    probe = fit_probe(x, y, ridge)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    beta = (probe.weight * x.std(0, correction=0)).requires_grad_()
    bias = (probe.bias + probe.weight @ x.mean(0)).requires_grad_()
    scores = z @ beta + bias
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, y.double(), reduction="none")
    loss = (losses[y].mean() + losses[~y].mean()) / 2 + ridge / 2 * beta.square().sum()
    for gradient in torch.autograd.grad(loss, [beta, bias]):
        assert gradient.abs().max() < 1e-9


def test_units_and_order_of_features_do_not_matter():
    x, y = rows(200, 3)
    want = fit_probe(x, y, 1e-3)
    moved = fit_probe(x * torch.tensor([1e3, 1.0, 1e-3]) + 7, y, 1e-3)
    assert_close(moved.weight * torch.tensor([1e3, 1.0, 1e-3]).double(), want.weight, rtol=1e-6, atol=1e-9)
    assert torch.equal(moved.says_yes(x * torch.tensor([1e3, 1.0, 1e-3]) + 7), want.says_yes(x))
    turned = fit_probe(x[:, [2, 0, 1]], y, 1e-3)
    assert_close(turned.weight, want.weight[[2, 0, 1]], rtol=1e-6, atol=1e-9)


def test_separable_rows_and_features_that_never_vary_end_well():
    x = torch.cat([torch.linspace(-1, 1, 50)[:, None], torch.full((50, 1), 3.0), torch.zeros(50, 1)], dim=1)
    y = x[:, 0] > 0
    probe = fit_probe(x, y, 1e-3)
    assert torch.equal(probe.says_yes(x), y)
    assert probe.weight[1:].tolist() == [0, 0]
    assert torch.isfinite(probe.weight).all()


def test_a_feature_twice_shares_its_weight():
    x, y = rows(200, 1)
    single, double = fit_probe(x, y, 1e-9), fit_probe(torch.cat([x, x], dim=1), y, 1e-9)
    assert_close(double.weight[0], double.weight[1], rtol=1e-5, atol=1e-9)
    assert_close(double.weight.sum(), single.weight[0], rtol=1e-5, atol=1e-9)


def test_both_classes_are_needed():
    with pytest.raises(DataError, match="0 of 5 rows are positive"):
        fit_probe(torch.randn(5, 1), torch.zeros(5, dtype=torch.bool), 1e-3)
