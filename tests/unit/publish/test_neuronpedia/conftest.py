from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented_suite import GOLDEN, Shape, SuiteShape, write_suite


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The suite of the golden files."""
    return write_suite(tmp_path / "suite", GOLDEN)


@pytest.fixture
def make_suite(tmp_path: Path) -> Callable[..., Path]:
    """Write a suite of SAEs with these fields of Shape, and with any other field of SuiteShape."""

    def made(*saes: dict[str, Any], **fields: Any) -> Path:
        return write_suite(tmp_path / "suite", SuiteShape(tuple(Shape(**sae) for sae in saes), **fields))

    return made
