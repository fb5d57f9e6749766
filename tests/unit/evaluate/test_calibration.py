"""What training rows say: the same from shards and from a pass, kept once made."""

from pathlib import Path

import pytest
import torch
from small_scope import build_scope, write_shards

from everyscope.activations.shards.reader import Shards
from everyscope.base.errors import DataError, ShapeMismatch
from everyscope.evaluate import calibration
from everyscope.evaluate.calibration import CALIBRATION_FILE, CalibrationSums, calibrate
from everyscope.evaluate.cost import read_costs
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site

SITE = Site("mlp_out", 1)


def test_mean_components_and_norms_are_those_of_direct_computation():
    torch.manual_seed(0)
    x = torch.randn(3000, 6) @ torch.randn(6, 6) + 20
    sums = CalibrationSums()
    for rows in x.split(170):
        sums.update(rows)
    sums.update(x[:0])
    found = sums.finish()
    exact = x.double()
    assert torch.allclose(found.mean, exact.mean(0), rtol=1e-12)
    _, _, right = torch.linalg.svd(exact - exact.mean(0))
    assert torch.allclose((found.components.T @ right.T).abs(), torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert found.norm_limit == torch.inf
    assert torch.equal(found.rows, x[: calibration.KEPT_ROWS])
    with pytest.raises(DataError, match="calibration_sequences"):
        CalibrationSums().finish()


def test_shards_and_a_pass_over_training_documents_agree(tmp_path: Path):
    config = build_scope(tmp_path, (SITE,))
    language = load_language_model(config.model)
    of_shards = calibrate(config, [SITE], language)
    assert not read_costs(config.out)
    without = config.model_copy(update={"shards": None, "out": tmp_path / "other", "calibration_sequences": 10_000})
    of_text = calibrate(without, [SITE], language)
    (cost,) = read_costs(without.out).values()
    assert cost.calibration > 1
    got, want = of_text[SITE], of_shards[SITE]
    assert torch.allclose(got.mean, want.mean, atol=1e-6)
    assert torch.allclose((got.components.T @ want.components).abs(), torch.eye(16, dtype=torch.float64), atol=1e-3)
    assert float(got.norm_limit) == pytest.approx(float(want.norm_limit), rel=1e-5)


def test_what_is_kept_is_used_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = build_scope(tmp_path, (SITE,))
    language = load_language_model(config.model)
    calibrate(config, [SITE], language)
    file = config.out / SITE.folder / CALIBRATION_FILE
    first = file.read_bytes()
    file.write_bytes(b"damaged")
    calibrate(config, [SITE], language)
    assert file.read_bytes() == first
    calibrate(config.model_copy(update={"pca_rows": 100}), [SITE], language)
    assert file.read_bytes() != first
    monkeypatch.setattr(calibration, "_of_shards", lambda *_: pytest.fail("it was there"))
    calibrate(config.model_copy(update={"pca_rows": 100}), [SITE], language)


def test_shards_of_another_model_are_refused(tmp_path: Path):
    config = build_scope(tmp_path, (SITE,))
    other = tmp_path / "other"
    write_shards(other / SITE.folder, SITE, torch.randn(50, 5))
    assert Shards(other / SITE.folder).d_in == 5
    with pytest.raises(ShapeMismatch, match=r"mlp_out layer 1: the model gives d_in=16, the shards 5"):
        calibrate(config.model_copy(update={"shards": other}), [SITE], load_language_model(config.model))
