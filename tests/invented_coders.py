"""Coders of random numbers for tests of file formats, and the activations that they meet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everyscope.base.errors import EveryscopeError
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.reader import load_sae

D_IN, D_SAE, D_OUT = 6, 40, 5
X = np.random.default_rng(7).normal(size=(50, D_IN)).astype(np.float32)
TRANSCODER = SaeMetadata(Site("mlp_in", 3), "google/gemma-2-2b", 9.0, target=Site("mlp_out", 3), convention="mlp_input")


def arrays(d_out: int = D_IN, seed: int = 0) -> dict[str, Any]:
    """W_enc, W_dec, b_enc, b_dec, threshold and W_skip in our layout; latents fire now and then, W_skip is not symmetric."""
    random = np.random.default_rng(seed)
    made = {
        "W_enc": random.normal(size=(D_IN, D_SAE)),
        "W_dec": random.normal(size=(D_SAE, d_out)),
        "b_enc": random.normal(size=D_SAE) - 0.5,
        "b_dec": random.normal(size=d_out),
        "threshold": random.uniform(0.1, 2, D_SAE),
        "W_skip": random.normal(size=(D_IN, d_out)),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


def coder(
    d_out: int = D_IN, *, skip: bool = False, top_k: int | None = None, metadata: SaeMetadata | None = None, seed: int = 0
) -> Sae:
    """One of those as a coder; TopK ones have no thresholds."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays(d_out, seed).items()}
    if top_k is not None:
        tensors["threshold"] = torch.zeros(D_SAE)
    if not skip:
        del tensors["W_skip"]
    known = metadata or (replace(TRANSCODER) if skip or d_out != D_IN else SaeMetadata(Site("resid_post", 3), "gpt2", 9.0))
    return Sae(**tensors, metadata=known, top_k=top_k)


def jumprelu(pre: Any, threshold: Any) -> Any:
    """Where pre > threshold, pre, else 0."""
    return np.where(pre > threshold, np.maximum(pre, 0), 0)


def largest(pre: Any, k: int) -> Any:
    """The k largest of relu(pre) of each row, else 0."""
    f = np.maximum(pre, 0)
    return np.where(f >= np.sort(f, axis=1)[:, [-k]], f, 0)


def assert_reads_as(path: Path, f: Any, y: Any) -> Sae:
    """What is at `path` gives latents `f` and outputs `y` of X."""
    found, x = load_sae(path), torch.from_numpy(X)
    assert 0 < (f > 0).sum() < f.size
    assert_close(found.encode(x).numpy(), f.astype(np.float32), rtol=1e-5, atol=1e-5)
    assert_close(found(x).numpy(), y.astype(np.float32), rtol=1e-5, atol=1e-5)
    return found


def assert_equal_coders(found: Sae, wanted: Sae) -> None:
    """The same tensors, bit for bit, and the same kind."""
    assert (found.top_k, found.is_transcoder, found.tensors().keys()) == (
        wanted.top_k,
        wanted.is_transcoder,
        wanted.tensors().keys(),
    )
    for name, tensor in wanted.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def assert_same_function(found: Sae, wanted: Sae) -> None:
    """The same latents and outputs."""
    x = torch.from_numpy(X)
    assert_close(found.encode(x), wanted.encode(x), rtol=1e-5, atol=1e-5)
    assert_close(found(x), wanted(x), rtol=1e-5, atol=1e-5)


def assert_refused(path: Path, says: str, error: type[EveryscopeError] = EveryscopeError) -> None:
    """Reading `path` fails with one line that matches `says`."""
    with pytest.raises(error, match=says) as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is not EveryscopeError
