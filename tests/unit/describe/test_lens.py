"""The ends of a product that is never held whole: exact in whatever format it was screened, however it was cut."""

from typing import Any

import numpy as np
import pytest
import torch

from everyscope.describe import lens as lenses
from everyscope.describe.lens import Lens, faster_format


def exact_ends(directions: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """By float64 products and a stable sort."""
    products = directions.double() @ rows.double().T
    orders = [(-sign * products).argsort(dim=1, stable=True)[:, :count] for sign in (1, -1)]
    return torch.stack(orders, 1).numpy(), torch.stack([products.gather(1, order) for order in orders], 1).numpy()


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setattr(lenses, "faster_format", lambda rows: request.param)
    return request.param


def test_ends_are_those_of_the_exact_product(form: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Also where rows differ much in norm, tiles end in the middle of a vector, and directions are split among chunks."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3001, 40, generator=generator) * torch.rand(3001, 1, generator=generator).exp2().pow(6)
    directions = torch.randn(23, 40, generator=generator) * torch.linspace(1e-3, 1e3, 23)[:, None]
    tokens, values = exact_ends(directions, rows[:2987], 10)
    for tile, chunk in ((2048, 256), (70, 5), (8, 23)):
        monkeypatch.setattr(lenses, "TILE_TOKENS", tile)
        monkeypatch.setattr(lenses, "CHUNK_LATENTS", chunk)
        found = Lens(rows, 2987).ends(directions, 10)
        assert np.array_equal(found.tokens, tokens)
        np.testing.assert_allclose(found.values, values, rtol=1e-6)


def test_products_that_differ_by_less_than_the_screen_sees_are_told_apart(form: torch.dtype):
    """Rows that are one row in bfloat16: the order among them is that of what rounding took away."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 32, generator=generator)
    near = base * (1 + 1e-4 * torch.randn(60, 1, generator=generator))
    rows = torch.cat([torch.randn(500, 32, generator=generator) * 0.1, near, -near])
    tokens, values = exact_ends(base, rows, 7)
    found = Lens(rows, len(rows)).ends(base, 7)
    assert np.array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.values, values, rtol=1e-6)


def test_directions_for_which_all_tokens_tie(form: torch.dtype):
    """No direction at all, and more equal rows than there is room for candidates: the smallest tokens come first."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1, 16, generator=generator).repeat(4000, 1)
    found = Lens(rows, 4000).ends(torch.cat([torch.zeros(1, 16), torch.ones(1, 16)]), 3)
    assert found.tokens.tolist() == [[[0, 1, 2]] * 2] * 2
    assert found.values[0].tolist() == [[0.0] * 3] * 2
    np.testing.assert_allclose(found.values[1], float(rows[0].double().sum()), rtol=1e-6)


def test_threads_and_small_vocabularies_change_nothing(form: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(3)
    rows, directions = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    alone = Lens(rows, 6).ends(directions, 10)
    assert alone.tokens.shape == (40, 2, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = Lens(rows, 6).ends(directions, 10)
    assert np.array_equal(alone.tokens, several.tokens)
    assert np.array_equal(alone.values, several.values)
    assert Lens(rows, 6).ends(directions[:0], 10).tokens.shape == (0, 2, 6)


def test_the_tiled_path_of_other_devices_is_the_same():
    generator = torch.Generator().manual_seed(4)
    rows, directions = torch.randn(5000, 24, generator=generator), torch.randn(9, 24, generator=generator)
    want, found = Lens(rows, 5000).ends(directions, 10), lenses._ends_by_tiles(directions, rows, 10)
    assert np.array_equal(found.tokens, want.tokens)
    np.testing.assert_allclose(found.values, want.values, rtol=1e-5)


def test_the_format_is_the_one_whose_product_took_less(monkeypatch: pytest.MonkeyPatch):
    clock: dict[str, Any] = {"now": 0.0}

    product = torch.mm

    def timed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        clock["now"] += clock[str(left.dtype)]
        return product(left, right)

    monkeypatch.setattr(torch, "mm", timed)
    monkeypatch.setattr(lenses.time, "perf_counter", lambda: clock["now"])
    for faster, slower in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        clock |= {str(faster): 1.0, str(slower): 2.0}
        assert faster_format(torch.ones(8, 4)) == faster
