"""Attribution entropy of hand-made cases, and that one backward pass gives every site's gradient."""

import math

import pytest
import torch
from small_scope import SITES, tiny_gemma
from torch.testing import assert_close

from everyscope.evaluate.held_out import Batch
from everyscope.evaluate.passes import clean_pass, spliced_logits
from everyscope.evaluate.uniformity import UniformitySums, attribution_entropy, attributions, centred_logits
from everyscope.sites.names import Site

INPUT_IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
INPUT_IDS[:, 0] = 2
MASK = INPUT_IDS != 2
MASK[1, 5] = False
BATCH = Batch(0, INPUT_IDS, MASK, torch.zeros_like(INPUT_IDS), torch.zeros_like(INPUT_IDS))


def test_entropies_of_hand_made_attributions():
    y = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 5.0, 1.0, -3.0, 0.0])
    found = attribution_entropy(y, torch.tensor([4, 2, 0, 2, 1])).tolist()
    want = [math.log(4), 0.0, math.nan, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), math.nan]
    assert found == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_silent_latents_add_nothing():
    """Against the formula over all latents."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(20, 50, generator=generator).relu() * (torch.rand(20, 50, generator=generator) < 0.2)
    gradient, W_dec = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    every = f.double() * (gradient.double() @ W_dec.double().T)
    y, firing = attributions(f, gradient, W_dec)
    assert_close(y.double(), every[f > 0], rtol=1e-6, atol=1e-6)
    assert firing.tolist() == (f > 0).sum(1).tolist()
    dense = torch.zeros(20, 50, dtype=torch.float64)
    dense[f > 0] = y.double()
    p = dense.abs() / dense.abs().sum(1, keepdim=True)
    want = -torch.xlogy(p, p).sum(1)
    assert_close(attribution_entropy(y, firing), want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_hand_made_case_from_codes_and_gradient():
    """Two latents that write along the axes, of activations 2 and 1, where the gradient is (3, 2): y = (6, 2), p = (3/4, 1/4)."""
    W_dec = torch.eye(3, 2)
    f, gradient = torch.tensor([[2.0, 1.0, 0.0], [4.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[3.0, 2], [1, 1], [0, 0]])
    assert [part.tolist() for part in attributions(f, gradient, W_dec)] == [[6, 2, 4, 0], [2, 1, 1]]
    sums = UniformitySums.start()
    sums.update(f, gradient, W_dec)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    found = sums.as_json()
    assert found is not None
    assert found["num_positions"] == 2  # the third row has no gradient
    assert found["entropy"] == pytest.approx(entropy / 2)
    assert found["effective"] == pytest.approx((math.exp(entropy) + 1) / 2)
    assert found["r_l0"] == pytest.approx((math.exp(entropy) / 2 + 1) / 2)
    assert UniformitySums.start().as_json() is None


@pytest.mark.parametrize("site", SITES, ids=str)
def test_gradients_are_those_of_finite_differences(site: Site):
    model = tiny_gemma(64).double()
    clean = clean_pass(model, list(SITES), BATCH, with_gradients=True)
    x, gradient = clean.activations[site][MASK], clean.gradients[site][MASK]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    @torch.no_grad()
    def goal(step: float) -> float:
        logits = spliced_logits(model, INPUT_IDS, site, x + step * direction, MASK, clean.activations)
        return float(centred_logits(logits.double(), INPUT_IDS, MASK))

    slope = (goal(1e-3) - goal(-1e-3)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-3)  # the goal is summed in float32


def test_a_pass_that_keeps_its_graph_gives_the_same_bits():
    model = tiny_gemma(64)
    with_graph, without = (clean_pass(model, list(SITES), BATCH, keeps) for keeps in (True, False))
    assert_close(with_graph.logits, without.logits, rtol=0, atol=0)
    for site in SITES:
        assert_close(with_graph.activations[site], without.activations[site], rtol=0, atol=0)
        assert not with_graph.activations[site].requires_grad
