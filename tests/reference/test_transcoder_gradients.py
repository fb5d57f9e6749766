"""Transcoders' closed-form gradients against float64 autograd with the paper's pseudo-derivatives."""

import pytest
import torch
from jumprelu_oracles import OracleJumpRelu, OracleStep, flat

from everyscope.sae.functional import loss_gradients
from everyscope.sae.trainable import TENSORS

NAMES = (*TENSORS, "w_skip")


def problem(rows, d_in, d_sae, d_out, seed, *, has_skip):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p = {
        "W_enc": draw(d_in, d_sae),
        "W_dec": draw(d_sae, d_out),
        "b_enc": draw(d_sae),
        "b_dec": draw(d_out),
        "threshold": draw(d_sae).abs(),
    }
    return draw(rows, d_in), draw(rows, d_out), p | ({"w_skip": draw(d_in, d_out)} if has_skip else {})


def oracle(x, y, p, coefficient, bandwidth, prefixes):
    """The loss as issue and paper write it: the encoder sees x as it is, every prefix has bias and skip."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    pre = x @ leaves["W_enc"] + leaves["b_enc"]
    f = OracleJumpRelu.apply(pre, leaves["threshold"], bandwidth)
    l0 = OracleStep.apply(pre, leaves["threshold"], bandwidth).sum(1)
    shared = leaves["b_dec"] + (x @ leaves["w_skip"] if "w_skip" in leaves else 0)
    squares = [(y - f[:, :m] @ leaves["W_dec"][:m] - shared).square().sum(1).mean() for m in prefixes]
    loss = sum(squares) / len(prefixes) + coefficient * l0.mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), squares[-1].detach(), l0.mean().detach()


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("prefixes", [[24], [5, 24], [1, 7, 24]])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "bandwidth"), [(64, 16, 16, 0.3), (33, 5, 9, 1.1), (7, 12, 3, 0.6), (1, 4, 4, 0.05)]
)
def test_all_gradients_equal_the_float64_oracle(rows, d_in, d_out, bandwidth, prefixes, has_skip):
    x, y, p = problem(rows, d_in, 24, d_out, seed=rows, has_skip=has_skip)
    want, error, l0 = oracle(x, y, p, 0.2, bandwidth, prefixes)
    got = loss_gradients(x, **p, target=y, is_transcoder=True, penalty=flat(0.2), bandwidth=bandwidth, prefixes=prefixes)
    for name in p:
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(got.reconstruction_loss, error, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.l0, l0, rtol=1e-12, atol=1e-12)
    assert (got.w_skip is not None) == has_skip


@pytest.mark.parametrize("prefixes", [[24], [5, 24]])
def test_a_target_that_is_the_input_is_an_sae_to_the_bit(prefixes):
    x, _, p = problem(50, 8, 24, 8, seed=3, has_skip=False)
    plain = loss_gradients(x, **p, penalty=flat(0.2), bandwidth=0.4, prefixes=prefixes)
    other = loss_gradients(x, **p, target=x.clone(), penalty=flat(0.2), bandwidth=0.4, prefixes=prefixes)
    for name in TENSORS:
        assert torch.equal(getattr(plain, name), getattr(other, name))
    assert other.w_skip is None
