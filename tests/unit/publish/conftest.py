from pathlib import Path

import pytest
from invented_scores import SITES, add_sae

from everyscope.publish.config import PublishConfig


@pytest.fixture
def published(tmp_path: Path) -> PublishConfig:
    """A config whose inputs are there: two widths and three sparsities at six sites."""
    config = PublishConfig(
        trained=tmp_path / "train", scores=tmp_path / "scores", out=tmp_path / "suite", title="Test scope", model="some/model"
    )
    for site in SITES:
        for width in (512, 1024):
            for threshold in (0.2, 0.5, 0.8):
                add_sae(config, site, f"w{width}_{threshold}", width, threshold)
    return config
