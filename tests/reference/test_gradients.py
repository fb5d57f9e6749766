"""The closed-form gradients against float64 autograd with the paper's pseudo-derivatives, and against plain sums."""

from functools import partial

import pytest
import torch
from jumprelu_oracles import OracleJumpRelu, OracleStep, flat

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.functional import Gradients, jumprelu, loss_gradients
from everyscope.sae.objective import penalty
from everyscope.sae.trainable import TENSORS


def problem(rows, d_in, d_sae, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p = {
        "W_enc": draw(d_in, d_sae),
        "W_dec": draw(d_sae, d_in),
        "b_enc": draw(d_sae),
        "b_dec": draw(d_in),
        "threshold": draw(d_sae).abs(),
    }
    return draw(rows, d_in), p


def oracle(x, p, sparsity_coefficient, bandwidth, prefixes=None, sparsity=None) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    pre = (x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    f = OracleJumpRelu.apply(pre, leaves["threshold"], bandwidth)
    fires = OracleStep.apply(pre, leaves["threshold"], bandwidth)
    l0 = fires.sum(1)
    prefixes = prefixes or [len(p["threshold"])]
    squares = [(x - f[:, :m] @ leaves["W_dec"][:m] - leaves["b_dec"]).square().sum(1).mean() for m in prefixes]
    loss = sum(squares) / len(prefixes) + (sparsity(fires.mean(0)) if sparsity else sparsity_coefficient * l0.mean())
    gradients = torch.autograd.grad(loss, [leaves[name] for name in TENSORS])
    return dict(zip(TENSORS, gradients, strict=True)) | {"loss": loss.detach(), "l0": l0.mean().detach()}


@pytest.mark.parametrize(("rows", "d_in", "d_sae", "bandwidth"), [(64, 32, 96, 0.3), (7, 5, 33, 1.5), (1, 3, 4, 0.05)])
def test_all_five_gradients_equal_the_float64_oracle(rows, d_in, d_sae, bandwidth):
    x, p = problem(rows, d_in, d_sae, seed=rows)
    want = oracle(x, p, 0.2, bandwidth)
    got = loss_gradients(x, **p, penalty=flat(0.2), bandwidth=bandwidth)
    for name in TENSORS:
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(got.reconstruction_loss + 0.2 * got.l0, want["loss"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefixes", [[8], [3, 8], [1, 2, 8]])
def test_prefixes_reconstruct_each_by_itself(prefixes):
    x, p = problem(40, 5, 8, seed=11)
    want = oracle(x, p, 0.2, 0.6, prefixes)
    got = loss_gradients(x, **p, penalty=flat(0.2), bandwidth=0.6, prefixes=prefixes)
    for name in TENSORS:
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("target", "limit"), [(None, None), (3.0, None), (None, 0.3), (3.0, 0.3)])
def test_penalties_are_the_derivatives_of_the_costs_they_name(target, limit):
    x, p = problem(200, 6, 12, seed=12)
    preset = SaePreset(frequency_limit=limit, frequency_coefficient=0.7)
    sparsity = {"sparsity_coefficient": 0.4} if target is None else {"target_l0": target, "target_weight": 0.4}
    config = SaeConfig(width=12, preset=preset, **sparsity)

    def cost(rates):
        l0 = rates.sum()
        value = 0.4 * l0 if target is None else 0.4 * (l0 / target - 1) ** 2
        return value if limit is None else value + 0.7 * (rates / limit - 1).clamp(min=0).square().sum()

    want = oracle(x, p, None, 0.9, sparsity=cost)
    got = loss_gradients(x, **p, penalty=partial(penalty, config, 0.4), bandwidth=0.9)
    torch.testing.assert_close(got.threshold, want["threshold"], rtol=1e-12, atol=1e-12)


def test_threshold_gradient_is_the_closed_form_of_the_spec():
    """dL/dtheta_i = 1/(N eps) sum_a [2 theta_i d_i.(x_a - x_hat_a) - lambda] K((pi_i - theta_i)/eps), summed in plain Python."""
    x, p = problem(rows=20, d_in=4, d_sae=6, seed=3)
    bandwidth, coefficient = 0.8, 0.3
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    x_hat = (pre * (pre > p["threshold"])) @ p["W_dec"] + p["b_dec"]
    got = loss_gradients(x, **p, penalty=flat(coefficient), bandwidth=bandwidth).threshold
    for i in range(6):
        total = 0.0
        for a in range(20):
            if abs((pre[a, i] - p["threshold"][i]) / bandwidth) < 0.5:
                total += 2 * p["threshold"][i] * (p["W_dec"][i] @ (x[a] - x_hat[a])) - coefficient
        assert float(got[i]) == pytest.approx(float(total) / (20 * bandwidth), rel=1e-12, abs=1e-12)


def test_the_sparsity_term_moves_thresholds_only():
    x, p = problem(rows=50, d_in=8, d_sae=20, seed=5)
    without, with_it = (loss_gradients(x, **p, penalty=flat(c), bandwidth=0.5) for c in (0.0, 9.0))
    for name in set(TENSORS) - {"threshold"}:
        assert torch.equal(getattr(without, name), getattr(with_it, name))
    assert not torch.equal(without.threshold, with_it.threshold)


def test_float32_gradients_follow_float64_within_rounding():
    x, p = problem(rows=256, d_in=64, d_sae=200, seed=6)
    want = loss_gradients(x, **p, penalty=flat(0.1), bandwidth=0.4)
    low = loss_gradients(x.float(), **{n: t.float() for n, t in p.items()}, penalty=flat(0.1), bandwidth=0.4)
    assert isinstance(low, Gradients)
    for name in TENSORS:
        difference = (getattr(low, name).double() - getattr(want, name)).norm() / getattr(want, name).norm()
        assert difference < 1e-4  # a pre-activation within rounding of a threshold may fall on its other side


def test_the_threshold_itself_does_not_pass():
    threshold = torch.tensor([0.5, 0.5, 0.5])
    assert jumprelu(torch.tensor([0.5, 0.50001, -2.0]), threshold).tolist() == pytest.approx([0.0, 0.50001, 0.0])
