"""Laws of what the figures draw."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from everyscope.publish.drawing.scales import bars, scale_log, scale_value
from everyscope.publish.sections.fidelity import band
from everyscope.publish.sections.transfer import transfer_pairs
from everyscope.publish.sections.widths import middle_groups
from everyscope.suite.positions import position_delta_loss, position_fvu, relative_error, stretches


def test_a_baselines_band_is_the_extremes_and_the_middle_of_the_layers_where_all_of_them_are():
    curves = [[(10, 0.5), (40, 0.3)], [(10, 0.4), (40, 0.2)], [(5, 0.9), (20, 0.3), (80, 0.1), (20, 0.5)]]
    l0s, (low, middle, high) = band(curves)
    assert (l0s[0], l0s[-1]) == pytest.approx((10, 40))
    at = int(np.argmin(np.abs(l0s - 20)))
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert low[-1] == pytest.approx(0.2)
    assert high[0] == pytest.approx(0.65)  # half way, in log L0, from 0.9 at 5 to the mean 0.4 of both points at 20
    assert middle[at] == pytest.approx(0.4, abs=0.01)
    assert not band([[(1, 1.0), (2, 1.0)], [(3, 1.0)]])[0].size


@pytest.mark.parametrize("length", [2, 5, 24, 1024])
def test_stretches_hold_every_position_once_and_in_order(length: int):
    tokens = np.arange(2, length + 2, dtype=np.float64)
    parts = stretches(tokens)
    assert np.concatenate(parts).tolist() == list(range(length))
    assert all(len(part) for part in parts)


def test_position_curves_are_ratios_of_sums_and_leave_out_what_is_unknown():
    count, errors, variances = np.array([4, 9, 1, 7]), np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 8.0, 6.0, 5.0])
    metrics = {
        "mse": 2.5,
        "by_position": {
            "position": [1, 500, 501, 502],
            "count": count.tolist(),
            "error": errors.tolist(),
            "fvu": [*(errors / variances)[:3].tolist(), None],
            "delta_loss": [0.5, 0.1, 0.4, None],
            "loss_count": [2, 3, 1, 0],
        },
    }
    tokens, values = relative_error(metrics)
    assert tokens[0] == 2
    assert values == pytest.approx([1 / 2.5, (errors * count)[1:].sum() / count[1:].sum() / 2.5])
    tokens, values = position_fvu(metrics)
    assert values == pytest.approx([0.5, (errors * count)[1:3].sum() / (variances * count)[1:3].sum()])
    assert position_delta_loss(metrics)[1] == pytest.approx([0.5, (0.1 * 3 + 0.4) / 4])


def test_each_site_is_shown_at_its_middle_l0():
    groups = [{"site": site, "l0": l0} for site in ("a", "b") for l0 in (30.0, 10.0, 20.0)]
    assert middle_groups(groups) == [{"site": "a", "l0": 20.0}, {"site": "b", "l0": 20.0}]
    assert middle_groups(groups[:2]) == [{"site": "a", "l0": 10.0}]


def test_base_saes_are_paired_with_tuned_ones_of_the_same_place_and_nearest_l0():
    place = {"site": "s", "width": 512, "segment": "all", "target": None}
    rows = [{**place, "sae": sae, "l0": l0} for sae, l0 in (("base", 10), ("tuned", 40), ("tuned", 12), ("base", 30))]
    rows.append({**place, "sae": "tuned", "l0": 10, "segment": "user"})
    assert [(base["l0"], tuned["l0"]) for base, tuned in transfer_pairs(rows)] == [(10, 12), (30, 40)]


def test_axes_hold_their_values_and_are_logarithmic_only_above_zero():
    axes = Figure().add_subplot()
    scale_value(axes, [0.001, 3.0], is_logarithmic=True)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 0.001
    assert axes.get_ylim()[1] > 3
    axes = Figure().add_subplot()
    scale_value(axes, [-0.1, 3.0], is_logarithmic=True)
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] < -0.1
    scale_log(axes.xaxis, [7.0])
    low, high = axes.get_xlim()
    assert low < 7 < high
    assert len([tick for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high]) >= 1


def test_bars_reach_from_the_value_to_both_ends():
    assert bars([1.0, 2.0], [(0.5, 1.25), None]) == [[0.5, 0.0], [0.25, 0.0]]
