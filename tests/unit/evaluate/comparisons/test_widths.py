import numpy as np
import pytest

from everyscope.evaluate.comparisons.widths import common_l0s, curve_at

L0 = np.array([10.0, 20.0, 80.0])
FVU = np.array([0.4, 0.3, 0.1])


def test_what_is_straight_in_log_l0_comes_back():
    line = 0.7 - 0.1 * np.log(L0)
    for wanted in (10, 13.7, 40, 80):
        assert curve_at(L0, line, wanted) == pytest.approx(0.7 - 0.1 * np.log(wanted), abs=1e-12)


def test_points_are_met_and_nothing_is_extrapolated():
    assert [curve_at(L0, FVU, wanted) for wanted in L0] == FVU.tolist()
    assert curve_at(L0, FVU, 40) == pytest.approx(0.2)
    assert curve_at(L0, FVU, 9.99) is None
    assert curve_at(L0, FVU, 80.01) is None


def test_order_does_not_matter_and_equal_l0s_count_as_one():
    assert curve_at(L0[::-1], FVU[::-1], 30) == curve_at(L0, FVU, 30)
    doubled = curve_at(np.array([10.0, 10.0, 40.0]), np.array([0.5, 0.3, 0.2]), 10)
    assert doubled == pytest.approx(0.4)
    assert curve_at(np.array([10.0]), np.array([0.5]), 10) == 0.5


def test_common_l0s_lie_in_every_curve():
    curves = [L0, np.array([15.0, 60.0]), np.array([12.0, 100.0])]
    assert common_l0s(curves, 3) == [15, pytest.approx(30), 60]
    assert common_l0s(curves, 1) == [pytest.approx(30)]
    assert all(curve_at(curve, curve, wanted) is not None for curve in curves for wanted in common_l0s(curves, 5))
    assert common_l0s([L0, np.array([90.0, 100.0])], 3) == []
    assert common_l0s([L0, np.array([20.0])], 3) == [20]
