import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from small_scope import SITES, build_scope, identity_sae, tree_bytes

from everyscope.base.errors import DataError, ShapeMismatch
from everyscope.evaluate import run as evaluate
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.files import save_sae
from everyscope.sites.names import Site

SITE = Site("mlp_out", 1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    config = build_scope(tmp_path_factory.mktemp("scope"))
    result = evaluate.run(config)
    assert (result.num_evaluated, result.num_skipped) == (2 * len(SITES), 0)
    return config


def metrics(config: EvaluateConfig, site: Site, name: str = "w32_0") -> dict:
    return json.loads((config.out / site.folder / name / "metrics.json").read_text())


def copied(config: EvaluateConfig, root: Path, **changes) -> EvaluateConfig:
    """The same run with only the SAEs of one site, and scores of its own."""
    shutil.copytree(config.trained / SITE.folder, root / "train" / SITE.folder)
    return config.model_copy(update={"trained": root / "train", "out": root / "scores", **changes})


@pytest.mark.parametrize("site", SITES, ids=str)
def test_scores_fit_together(evaluated: EvaluateConfig, site: Site):
    dense, sparse = metrics(evaluated, site, "w32_0"), metrics(evaluated, site, "w32_1")
    assert dense["l0"] > sparse["l0"] > 0
    for scores in (dense, sparse):
        assert scores["delta_loss"] == scores["loss_spliced"] - scores["loss_clean"]
        assert 0 <= scores["fvu_pca"] <= 1.5
        assert scores["num_tokens"] > scores["num_loss_tokens"] > 0
        assert 0 < scores["num_sequences"] <= evaluated.num_sequences
    assert dense["loss_mean_ablated"] == sparse["loss_mean_ablated"]


def test_latents_agree_with_the_metrics(evaluated: EvaluateConfig):
    scores = metrics(evaluated, SITE)
    rows = pyarrow.parquet.read_table(evaluated.out / SITE.folder / "w32_0" / "latents.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(32))
    assert sum(row["frequency"] for row in rows) == pytest.approx(scores["l0"])
    assert sum(row["firings"] == 0 for row in rows) / 32 == scores["dead_fraction"]
    assert all((row["mean_activation"] is None) == (row["firings"] == 0) for row in rows)


def test_scores_do_not_depend_on_the_batch_size(evaluated: EvaluateConfig, tmp_path: Path):
    other = copied(evaluated, tmp_path, batch_blocks=7)
    evaluate.run(other)
    got, want = metrics(other, SITE), metrics(evaluated, SITE)
    for name, value in want.items():
        if name != "evaluation":
            assert got[name] == (pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value), name


def test_an_added_sae_is_evaluated_alone_and_identity_costs_nothing(
    evaluated: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = copied(evaluated, tmp_path)
    evaluate.run(config)
    before = tree_bytes(config.out)
    save_sae(config.trained / SITE.folder / "identity", identity_sae(16), {})
    result = evaluate.run(config)
    assert (result.num_evaluated, result.num_skipped) == (1, 2)
    scores = metrics(config, SITE, "identity")
    assert (scores["delta_loss"], scores["fvu"], scores["loss_recovered"]) == (0, 0, 1)
    after = tree_bytes(config.out)
    assert {name: after[name] for name in before} == before
    monkeypatch.setattr(evaluate, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))
    assert evaluate.run(config).num_skipped == 3
    assert tree_bytes(config.out) == after


def test_scores_of_one_site_are_those_of_the_whole_run(evaluated: EvaluateConfig, tmp_path: Path):
    config = copied(evaluated, tmp_path)
    evaluate.run(config)
    for name in ("metrics.json", "latents.parquet"):
        place = Path(SITE.folder) / "w32_1" / name
        assert (config.out / place).read_bytes() == (evaluated.out / place).read_bytes()


def test_what_does_not_fit_is_refused(evaluated: EvaluateConfig, tmp_path: Path):
    config = copied(evaluated, tmp_path)
    with pytest.raises(DataError, match="everyscope train"):
        evaluate.run(config.model_copy(update={"trained": tmp_path / "nothing"}))
    save_sae(config.trained / SITE.folder / "wrong", identity_sae(5), {})
    with pytest.raises(ShapeMismatch, match="d_in=5"):
        evaluate.run(config)
