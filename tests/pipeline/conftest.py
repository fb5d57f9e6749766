"""Pipelines start many interpreters."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_start(forked_interpreters: None) -> None:
    """For every module of this folder."""
