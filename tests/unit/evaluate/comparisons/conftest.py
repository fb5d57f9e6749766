"""An evaluated little suite with two widths and three sparsities at two sites, made once."""

from pathlib import Path

import pytest
import torch
from small_scope import build_scope, random_sae

from everyscope.activations.shards.reader import Shards
from everyscope.evaluate import run as evaluate
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.files import write_sae
from everyscope.sites.names import Site

SITES = (Site("mlp_out", 1), Site("resid_post", 0))
WIDTHS, THRESHOLDS = (16, 48), (0.3, 0.6, 1.0)


def save(config: EvaluateConfig, site: Site, width: int, number: int) -> None:
    shards = Shards(config.shards / site.folder)
    rows = shards.rows(0, shards.num_rows)
    sae = random_sae(rows.shape[1], width, THRESHOLDS[number] * float((rows - rows.mean(0)).std()), rows.mean(0), seed=width)
    record = {"width": width, "num_tokens": 1000, "config": {"sparsity_coefficient": 0.1, "target_l0": 10.0 - number}}
    write_sae(config.trained / site.folder / f"w{width}_{number}", sae, record)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """Shared: read it, and write only below a copy's `out`."""
    with torch.random.fork_rng(devices=[]):
        config = build_scope(tmp_path_factory.mktemp("suite"), SITES)
    for path in sorted(config.trained.rglob("w32_*/*")):
        path.unlink()
    for site in SITES:
        for width in WIDTHS:
            for number in range(len(THRESHOLDS)):
                save(config, site, width, number)
    config = config.model_copy(update={"num_sequences": 16, "uniformity_sequences": 0, "baseline_sequences": 0, "resamples": 100})
    evaluate.run(config)
    return config


@pytest.fixture
def scratch(suite: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """The same suite with slices and further scores of its own: its scores are copied."""
    for path in suite.out.rglob("*"):
        if path.is_file() and not {"slices", "comparisons"} & set(path.parts):
            copy = tmp_path / "scores" / path.relative_to(suite.out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return suite.model_copy(update={"out": tmp_path / "scores"})
