import pytest
import torch
from small_scope import random_sae

from everyscope.evaluate.rounding import per_latent, rounded


def test_int8_is_off_by_at_most_half_a_step_of_each_latent():
    weights = torch.randn(20, 8) * torch.logspace(-3, 3, 20)[:, None]
    weights[3] = 0
    got = per_latent(weights)
    step = weights.abs().amax(1, keepdim=True) / 127
    assert ((got - weights).abs() <= step / 2 * (1 + 1e-5)).all()
    assert (got[3] == 0).all()
    levels = got / step.clamp(min=1e-30)
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert torch.allclose(per_latent(got), got)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_each_format_keeps_the_sae(dtype):
    sae = random_sae(8, 32, 0.1, torch.zeros(8), seed=0)
    x = torch.randn(50, 8)
    other = rounded(sae, dtype)
    assert other.W_enc.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    error = (other(x) - sae(x)).norm() / sae(x).norm()
    assert error == 0 if dtype == "float32" else 0 < error < 0.1
