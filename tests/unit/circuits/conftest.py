"""The tiny random models of every family that the tests of sites build, and a prompt for them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.sites.conftest import BOS, CONFIGS, CONTEXT, VOCAB, build, num_hooks


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def model(family: str):
    """A model of each family; the test fails that leaves a hook or a replaced forward behind."""
    model = build(family)
    yield model
    assert num_hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    config: Any = model.config
    assert config._attn_implementation == "eager"


@pytest.fixture
def gemma2():
    return build("gemma2")


@pytest.fixture
def llama():
    """A copy, which the test may change."""
    return copy.deepcopy(build("llama"))


@pytest.fixture
def prompt() -> Tensor:
    """One sequence, BOS first."""
    ids = torch.randint(3, VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    return ids
