"""What pages show of a text, of a latent on a text, and of continuations: ranks, shares, words that differ, repetition."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from browser.asking import FakeLive

from everyscope.browse.live import LiveModel
from everyscope.browse.queries import Index
from everyscope.browse.views.steer import SWEEP, PushRow, SteerRequest, differing, repeats
from everyscope.browse.views.text import DENSE, stacks, worth

SAE = "resid_post/layer_1/width_256/average_l0_11"
TEXT = "one%20two%20three%20four%20five%20six%20seven"


def test_all_layers_are_one_sae_of_each(index: Index):
    found = stacks(index)
    assert found[0].value.startswith("layers/resid_post/")
    assert {stack.value for stack in found} == {
        f"layers/{kind}/{width}" for kind in ("mlp_out", "resid_post") for width in (64, 256)
    }
    for stack in found:
        assert [sae.site.layer for sae in stack.saes] == [0, 1]
        kind, width = stack.value.split("/")[1:]
        assert {(sae.site.kind, sae.width) for sae in stack.saes} == {(kind, int(width))}
        for sae in stack.saes:
            rivals = [other for other in index.saes if (other.site, other.width) == (sae.site, sae.width)]
            assert sae.is_canonical or not any(other.is_canonical for other in rivals)


def test_dense_latents_are_left_out_and_others_ranked_by_share(index: Index, monkeypatch: pytest.MonkeyPatch):
    sae = index.find(SAE)
    highest, frequency = index.scales(sae)
    for latent in (0, 3, 19, 255):
        details = index.details(sae, latent, ["max_activation", "frequency"])
        assert highest[latent] == np.float32(details["max_activation"] or 0)
        assert frequency[latent] == np.float32(details["frequency"] or 0)
    assert DENSE == 0.1
    limit = float(np.median(frequency))
    monkeypatch.setattr("everyscope.browse.views.text.DENSE", limit)
    shares, _ = worth(index, sae, "share", has_dense=False)
    is_known, is_dense = highest > 0, frequency > limit
    assert is_dense.any()
    assert (~is_dense & is_known).any()
    assert not shares[is_dense].any()
    np.testing.assert_allclose((shares * highest)[is_known & ~is_dense], 1, rtol=1e-6)
    plain, _ = worth(index, sae, "activation", has_dense=True)
    assert set(plain.tolist()) == {1.0}


def test_a_cell_holds_the_first_latent_and_a_token_all_layers(get: Callable, index: Index):
    live = FakeLive()
    chosen = next(stack for stack in stacks(index) if stack.value == "layers/resid_post/256")
    page = get(f"/text?sae={chosen.value}&text={TEXT}&dense=show", lambda: live).text
    assert live.asked == [("one two three four five six seven", [sae.folder for sae in chosen.saes])]
    cells = re.findall(r'name="at" value="(\d+)\.(\d)" class="t a(\d+)" data-tip="([^"]*)"', page)
    assert {(int(place), int(layer)) for place, layer, _, _ in cells} == {
        (place, layer) for place in range(2, 8) for layer in (0, 1)
    }
    for place, layer, level, tip in cells:
        highest, _ = index.scales(chosen.saes[int(layer)])
        active = {(int(place) - 1) * (rank + 1) % 60: 6 / (rank + 1) for rank in range((int(place) - 1) % 12)}
        shares = {latent: value / highest[latent] for latent, value in active.items() if highest[latent] > 0}
        share = max(shares.values())
        assert int(level) == min(10, max(1, int(np.ceil(10 * np.float32(share)))))
        assert f"{active[max(shares, key=lambda latent: shares[latent])]:.3g}" in tip
    pane = get(f"/text/pane?sae={chosen.value}&text={TEXT}&dense=show&at=5", lambda: live).text
    assert re.findall(r"<h4>(.*?)</h4>", pane) == ["layer 1", "layer 0"]
    assert 'data-upto="23"' in pane  # "one two three four five"
    one = get(f"/text/pane?sae={chosen.value}&text={TEXT}&dense=show&at=5.1", lambda: live).text
    assert re.findall(r"<h4>(.*?)</h4>", one) == ["layer 1"]
    assert "<html" not in one


def test_a_text_tried_on_a_latent_is_shaded_and_marked(get: Callable, index: Index):
    live = FakeLive()
    highest, _ = index.scales(index.find(SAE))
    page = get(f"/sae/{SAE}/4/try?text={TEXT}", lambda: live).text
    tried = page[page.index('id="tried"') : page.index("</div>", page.index('id="tried"'))]
    fires = [6 / (rank + 1) for place in range(7) for rank in range(place % 12) if place * (rank + 1) % 60 == 4]
    assert fires == [3.0, 6.0]
    assert re.findall(r'class="t a(\d+)" data-tip="[^"]*  ([\d.]+)"', tried) == [
        (str(min(10, max(1, int(np.ceil(10 * np.float32(value / highest[4])))))), f"{value:.3g}") for value in fires
    ]
    assert page.count('class="tried"') == 2
    silent = get(f"/sae/{SAE}/59/try?text=one", lambda: live).text
    assert "does not fire" in silent
    assert 'class="tried"' not in silent
    assert "Try a text" not in get(f"/sae/{SAE}/4").text  # without a model


def test_a_sweep_keeps_the_ratio_of_its_latents(index: Index):
    sae = index.find(SAE)

    def strengths(*own: float, is_sweep: bool = True) -> list[list[float]]:
        rows = tuple(PushRow(sae, 1, strength) for strength in own)
        return SteerRequest("a", rows, is_sweep, 1, 0.0, 0).strengths

    assert strengths(2.0) == strengths(-0.5) == [[amount] for amount in SWEEP]
    assert strengths(2.0, -1.0) == [[amount, -amount / 2] for amount in SWEEP]
    assert strengths(0.0, 0.0) == [[amount, amount] for amount in SWEEP]
    assert strengths(0.0, 4.0) == [[0.0, amount] for amount in SWEEP]
    assert strengths(2.0, -1.0, is_sweep=False) == [[0.0, 0.0], [2.0, -1.0]]
    assert strengths() == [[], []]


@pytest.mark.parametrize("period", range(1, 10))
def test_repetition_is_a_short_stretch_over_and_over(period: int):
    stretch = [bytes([65 + place]) for place in range(period)]
    tokens = [b"start", *stretch * 30]
    assert repeats(tokens) == (period <= 6)
    assert repeats(tokens[-20:]) == (period <= 6)
    assert not repeats(tokens[-19:])
    assert not repeats([*tokens[:-5], b"other", *tokens[-4:]])


def test_words_that_differ_are_marked():
    assert differing("a cat sat", "a cat sat") == "a cat sat"
    assert differing("a cat sat", "a dog sat") == "a <mark>dog</mark> sat"
    assert differing("a cat", "<b>") == "<mark>&lt;b&gt;</mark>"
    assert differing("", b"\xff".decode("utf-8", "surrogateescape")) == '<mark><span class="mark">⟨FF⟩</span></mark>'


def test_a_page_that_is_to_start_asks_nothing_of_the_model(get: Callable):
    live = FakeLive()
    page = get(f"/steer?start=1&prompt=one%20two&sae={SAE}&latent=4", lambda: live).text
    assert "data-start" in page
    assert "one two</textarea>" in page
    assert not live.written
    assert "data-start" not in get("/steer?start=1", lambda: live).text
    assert LiveModel(None).state == "absent"
