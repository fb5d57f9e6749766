"""Real activations have means many times their spread and a few massive rows; learning from the usual rows must not suffer."""

from functools import cache

import pytest
import torch

from everyscope.base.errors import ConfigError, DataError
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.presets import fast
from everyscope.train.arrays import train_saes

D_IN, DIRECTIONS, ROWS, WIDTH, L0 = 64, 256, 16_384, 512, 16


def clean_rows() -> torch.Tensor:
    """Sums of a few of 256 directions in 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D_IN, generator=generator))
    fires = torch.rand(ROWS, DIRECTIONS, generator=generator) < 6 / DIRECTIONS
    return (fires * (0.5 + torch.rand(ROWS, DIRECTIONS, generator=generator))) @ directions


def trained(rows: torch.Tensor, usual: torch.Tensor, preset: SaePreset | None = None, **settings) -> tuple[float, float]:
    """FVU of the usual rows, and the share of latents silent on them."""
    config = SaeConfig(width=WIDTH, target_l0=L0, preset=preset or fast(D_IN))
    (sae,) = train_saes(rows, [config], num_tokens=600 * 256, batch_rows=256, **settings)
    x = rows[usual]
    f = sae.encode(x)
    fvu = (sae.decode(f).double() - x).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    return fvu.item(), (f == 0).all(0).double().mean().item()


@cache
def clean() -> float:
    fvu, dead = trained(clean_rows(), torch.ones(ROWS, dtype=torch.bool))
    assert fvu < 0.25
    assert dead < 0.05
    return fvu


@pytest.mark.parametrize("sds", [10, 30, 100])
def test_a_large_mean_costs_nothing(sds):
    rows = clean_rows()
    rows[:, 5] += sds * rows.std(0).norm()
    fvu, dead = trained(rows, torch.ones(ROWS, dtype=torch.bool))
    assert fvu < 1.1 * clean()
    assert dead < 0.05


@pytest.mark.parametrize("times", [100, 1000])
@pytest.mark.parametrize("share", [0.001, 0.01])
def test_massive_rows_cost_nothing(share, times):
    rows, generator = clean_rows(), torch.Generator().manual_seed(1)
    massive = torch.zeros(ROWS, dtype=torch.bool)
    massive[torch.randperm(ROWS, generator=generator)[: round(share * ROWS)]] = True
    rows[massive] += times * rows.norm(dim=1).median() * torch.nn.functional.one_hot(torch.tensor(7), D_IN)
    fvu, dead = trained(rows, ~massive)
    assert fvu < 1.1 * clean()
    assert dead < 0.05
    if (share, times) == (0.001, 1000):
        assert trained(rows, ~massive, max_norm=None)[0] > 2 * clean()


def test_a_row_that_a_large_mean_hides_does_not_end_training():
    """One row of 16 spreads beside a mean of eight: usual by its norm. Either bound saves the SAE that fails without."""
    rows, usual = clean_rows(), torch.ones(ROWS, dtype=torch.bool)
    spread, usual[99] = rows.std(0).norm(), False
    rows[:, 5] += 8 * spread
    rows[99] += 16 * spread * torch.nn.functional.normalize(torch.randn(D_IN, generator=torch.Generator().manual_seed(3)), dim=0)
    bounds = {"largest_step": None, "largest_row": None}
    unbounded = trained(rows, usual, fast(D_IN).model_copy(update=bounds))[0]
    assert unbounded > 1.5 * clean()
    assert trained(rows, usual, fast(D_IN).model_copy(update={"largest_row": None}))[0] < 1.25 * clean()
    assert trained(rows, usual, fast(D_IN).model_copy(update={"largest_step": None}))[0] < 1.05 * clean()
    assert trained(rows, usual)[0] < 1.05 * clean()


@pytest.mark.parametrize("fields", [{"is_centred": True}, {"largest_row": 5.0}])
def test_all_saes_of_a_group_see_the_same_rows(fields):
    rows = clean_rows()[:2000]
    configs = [SaeConfig(width=8, sparsity_coefficient=1e-3, preset=SaePreset(**chosen)) for chosen in ({}, fields)]
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} differs"):
        train_saes(rows, configs, num_tokens=1000, batch_rows=100)


@pytest.mark.parametrize(("value", "what"), [(0.0, "zero"), (3.0, "equal")])
def test_rows_that_do_not_vary_are_refused(value, what):
    config = SaeConfig(width=8, sparsity_coefficient=1e-3, preset=SaePreset(is_centred=True))
    with pytest.raises(DataError, match=f"all 500 rows are {what}"):
        train_saes(torch.full((500, 6), value), [config], num_tokens=1000, batch_rows=100)
