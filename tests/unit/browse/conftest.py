"""One small invented suite for all tests of the pages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser.asking import Answer, ask
from browser.invented_suite import Shape, write_invented_suite

from everyscope.browse.app import Browser
from everyscope.browse.live import LiveFactory
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index

SMALL = Shape(
    kinds=("mlp_out", "resid_post"), layers=2, widths=(64, 256), l0s=(5.2, 11.4), num_sequences=24, context=64, is_hostile=True
)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write it."""
    return write_invented_suite(tmp_path_factory.mktemp("invented"), SMALL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def index(suite: Path, cache: Path) -> Index:
    return Preparation(suite, cache).run()


@pytest.fixture
def get(suite: Path, cache: Path, index: Index) -> Callable[..., Answer]:
    """Ask the suite's pages; `live` is the language model's factory."""

    def asked(address: str, live: LiveFactory | None = None, host: str = "127.0.0.1:8017", **more: Any) -> Answer:
        preparation = Preparation(suite, cache)
        preparation.run()
        return ask(Browser(preparation, live).app(), address, host, **more)

    return asked
