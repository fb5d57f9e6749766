"""Figures: well-formed, inside their frames, escaped."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from everyscope.browse.svg.charts import Curve, Estimate, curves, estimates, gauge, histogram, profile
from everyscope.browse.svg.elements import Scale, element, linear_ticks, log_ticks, padded, tick_text
from everyscope.browse.svg.maps import HeatmapCell, Point, heat_map, layer_step, mark, pareto, pareto_ends

HARM = '"><script>alert(1)</script>'


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.13), (-3, 2), (1e-7, 3e-7), (12, 9_000)])
def test_linear_ticks_are_round_and_inside(low: float, high: float):
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) + 1e-12 for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-6) for step in steps)


@pytest.mark.parametrize(("low", "high"), [(1, 100), (0.013, 0.9), (0.2, 0.5), (1e-6, 1e6), (7, 9)])
def test_log_ticks_are_few_and_inside(low: float, high: float):
    ticks = log_ticks(low, high)
    assert 1 < len(ticks) <= 8
    assert all(low * 0.998 <= tick <= high * 1.002 for tick in ticks)


def test_a_scale_takes_its_ends_to_its_pixels_and_ratios_to_distances():
    plain, log = Scale(2, 6, 10, 50), Scale(1, 100, 0, 80, is_log=True)
    assert [plain(2), plain(4), plain(6)] == [10, 30, 50]
    assert [log(1), log(10), log(100)] == pytest.approx([0, 40, 80])
    assert Scale(3, 3, 0, 10)(3) == 0


def test_axes_hold_their_values():
    for is_log in (False, True):
        low, high = padded([0.2, 0.7, 3.0], is_log=is_log)
        assert low < 0.2
        assert high > 3
    assert padded([float("nan")], is_log=False) == (0.0, 1.0)
    assert padded([1, 2], is_log=False, from_zero=True)[0] == 0


def test_labels_of_ticks_are_short():
    assert [tick_text(value) for value in (0, 0.5, -2, 1e6, 2.5e-7)] == ["0", "0.5", "−2", "10⁶", "2.5·10⁻⁷"]


def test_attributes_and_text_are_escaped():
    made = element("text", HARM, data_tip=HARM, class_="a", x=1.50, y=None)
    found = ElementTree.fromstring(made)
    assert found.text == found.attrib["data-tip"] == HARM
    assert found.attrib.keys() == {"data-tip", "class", "x"}
    assert found.attrib["x"] == "1.5"


def figures() -> list[str]:
    points = [
        Point(10.0 * (1 + place), 0.3 / (1 + place), (0.05, 0.4), place, place, (0, 64), place == 1, None, HARM)
        for place in range(4)
    ]
    return [
        histogram([0, 1, 2], [3, 0], HARM, HARM, HARM),
        histogram([0, 1, 2], [3_000_000, 1], "x", "y", "z", is_tall_log=True),
        curves([Curve(HARM, [(1, 0.5), (2, None), (4, 0.2)])], "x", "y", "z", x_log=True),
        curves([Curve("nothing", [(1, None)])], "x", "y", "z"),
        estimates([Estimate(HARM, 0.5, (0.4, 0.6), False), Estimate("b", None, None, True)], "x", "y"),
        profile([0.1, None, 0.3], HARM, ["a", HARM, "c"]),
        gauge(0.9, (0.8, 1.2), 0.1, HARM),
        gauge(None, None, None, "nothing"),
        heat_map(["layer 0"], ["mlp_out"], [HeatmapCell(0, 0, 0.2, "/sae/x?a=1&b=2", HARM)], (0.2, 0.2), HARM),
        pareto(points, [[(1, 0.9), (100, 0.1)]], pareto_ends(points, [0.9]), "y", HARM, "clip"),
        *(str(mark(kind)) for kind in range(5)),
    ]


@pytest.mark.parametrize("svg", figures())
def test_figures_are_well_formed_and_carry_no_script_and_no_style(svg: str):
    tree = ElementTree.fromstring(svg)
    for node in tree.iter():
        assert node.tag != "script"
        assert not {name for name in node.attrib if name == "style" or name.startswith("on")}
        assert "nan" not in " ".join(node.attrib.values())


def test_layers_have_colours_from_the_first_to_the_last():
    assert [layer_step(layer, [0, 5, 10]) for layer in (0, 5, 10)] == [0, 6, 11]
    assert layer_step(3, [3]) == 0
