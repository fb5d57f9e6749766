from pathlib import Path

import pytest
from built_once import built_once
from invented_scores import SITES, add_sae, add_slices

from everyscope.publish import pages
from everyscope.publish import run as publish
from everyscope.publish.config import PublishConfig
from everyscope.publish.drawing.pictures import Picture


@pytest.fixture
def few(tmp_path: Path) -> PublishConfig:
    """A config whose inputs are there: two SAEs of two sites, no slices."""
    config = _config(tmp_path)
    for site in SITES[-2:]:
        for threshold in (0.2, 0.5):
            add_sae(config, site, f"w512_{threshold}", 512, threshold)
    return config


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishConfig:
    """A published suite with everything: two widths and three sparsities at six sites, all slices. Read it, never write to it."""
    return _config(built_once(tmp_path_factory, "published", _publish))


def _publish(root: Path) -> None:
    config = _config(root)
    for site in SITES:
        for width in (512, 1024):
            for threshold in (0.2, 0.5, 0.8):
                add_sae(config, site, f"w{width}_{threshold}", width, threshold)
    add_slices(config, SITES[-1], "w512_0.5", "w1024_0.5")
    publish.run(config)


def _config(root: Path) -> PublishConfig:
    return PublishConfig(
        trained=root / "train", scores=root / "scores", out=root / "suite", title="Test scope", model="some/model"
    )


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish without drawing, which takes most of the time: pictures are empty files."""

    def touch(folder: Path, picture: Picture, basis: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in picture.files:
            (folder / name).write_text(basis)

    monkeypatch.setattr(pages, "write_picture", touch)
    monkeypatch.setattr(pages, "panel_svg", lambda panel: "<svg></svg>")
