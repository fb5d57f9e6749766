from pathlib import Path

import pytest
import torch
from small_scope import write_shards

from everyscope.evaluate import pca
from everyscope.evaluate.pca import PcaSums, cached_pca, fit_pca
from everyscope.shards.reader import Shards
from everyscope.sites.names import Site

SITE = Site("resid_post", 0)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    torch.manual_seed(0)
    write_shards(tmp_path, SITE, torch.randn(300, 6) @ torch.randn(6, 6) + 20)
    return Shards(tmp_path)


@pytest.mark.parametrize("num_components", [0, 1, 3, 6, 9])
def test_fvu_equals_direct_projection(shards: Shards, num_components: int):
    basis = fit_pca(shards, 200)
    train, held_out = shards.rows(0, 200).double(), shards.rows(200, 300).double()
    sums = PcaSums.start(6)
    for batch in held_out.split(17):
        sums.update(batch, basis)
    _, _, right = torch.linalg.svd(train - train.mean(0))
    kept = right[:num_components]
    residual = (held_out - train.mean(0)) - (held_out - train.mean(0)) @ kept.T @ kept
    want = residual.square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert sums.fvu(num_components) == pytest.approx(float(want), rel=1e-9, abs=1e-12)


def test_components_are_orthonormal_and_fall_in_variance(shards: Shards):
    basis = fit_pca(shards, 300)
    assert torch.allclose(basis.components.T @ basis.components, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert (basis.variances.diff() <= 0).all()


def test_the_cache_is_used_and_its_bytes_do_not_vary(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = tmp_path / "first.safetensors"
    cached_pca(first, shards, 100)
    cached_pca(tmp_path / "second.safetensors", shards, 100)
    assert first.read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    first.write_bytes(b"damaged")
    cached_pca(first, shards, 100)
    assert first.read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    monkeypatch.setattr(pca, "fit_pca", lambda *_: pytest.fail("the cache was not used"))
    cached_pca(first, shards, 100)
