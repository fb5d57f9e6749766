"""The linear map beside transcoders: least squares, exactly, whatever the means and however rows come."""

import numpy as np
import pytest
import torch

from everyscope.base.errors import DataError
from everyscope.evaluate.baselines import Baseline, baselines_of, edit_of
from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.linear import LinearSums, usual_pairs
from everyscope.suite.records import beaten_by


def rows(count: int, d_in: int, d_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(count)
    x = 3 * torch.randn(count, d_in, generator=g) + 50
    return x, x @ torch.randn(d_in, d_out, generator=g) + torch.randn(count, d_out, generator=g) - 7


def test_it_is_least_squares_with_an_intercept():
    x, y = rows(500, 7, 4)
    sums = LinearSums()
    for part in range(0, 500, 130):
        sums.update(x[part : part + 130], y[part : part + 130])
    got = sums.finish()
    design = np.concatenate([x.double().numpy(), np.ones((500, 1))], axis=1)
    want = design @ np.linalg.lstsq(design, y.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(got(x).numpy(), want, rtol=0, atol=1e-7)


def test_a_linear_mlp_is_explained_whole():
    x, _ = rows(300, 9, 1)
    y = x @ torch.randn(9, 6, generator=torch.Generator().manual_seed(1)) + 2
    sums = LinearSums()
    sums.update(x, y)
    errors = (sums.finish()(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert float(errors) < 1e-10


def test_inputs_that_are_copies_of_one_another_do_no_harm():
    x, y = rows(200, 5, 3)
    sums, twice = LinearSums(), LinearSums()
    sums.update(x, y)
    twice.update(torch.cat([x, x], 1), y)
    torch.testing.assert_close(twice.finish()(torch.cat([x, x], 1)), sums.finish()(x), rtol=0, atol=1e-6)


def test_without_rows_there_is_no_map():
    with pytest.raises(DataError, match="no unmasked token"):
        LinearSums().finish()


def calibration(limit: float) -> Calibration:
    return Calibration(torch.zeros(3), torch.eye(3), torch.tensor(limit), torch.zeros(1, 3))


def test_a_row_counts_where_it_is_massive_on_neither_side():
    x, y = torch.ones(4, 3), torch.ones(4, 3)
    x[1] *= 100
    y[2] *= 100
    assert usual_pairs(x, y, calibration(50.0), calibration(50.0)).tolist() == [True, False, False, True]
    assert usual_pairs(x, y, calibration(50.0), calibration(float("inf"))).tolist() == [True, False, True, True]


def test_transcoders_have_the_linear_map_and_components_of_what_they_predict():
    assert [one.name for one in baselines_of(12.4, 64, is_transcoder=True)] == ["pca_12", "linear"]
    x, y = rows(300, 7, 4)
    sums = LinearSums()
    sums.update(x, y)
    made = sums.finish()
    x_hat, used = edit_of(Baseline("linear", 0), calibration(1.0), made)(x)
    assert torch.equal(x_hat, made(x))
    assert used.tolist() == [7.0] * 300


def test_a_transcoder_is_held_against_the_linear_map_alone():
    assert beaten_by(0.5, {"pca": 0.1, "linear": 0.6, "mean": 1.0}) == []
    assert beaten_by(0.5, {"pca": 0.1, "linear": 0.4}) == ["a linear map"]
    assert beaten_by(0.5, {"pca": 0.1, "neuron_basis": 0.9}) == ["PCA"]
