"""Shards to serve, and servers that end with their test."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from served_rows import Start, write_sites


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("served") / "shards")


@pytest.fixture
def start(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    with ExitStack() as stack:
        yield Start(shards, stack)
