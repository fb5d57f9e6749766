"""Invented text and codes: what they should come to can be counted by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from everyscope.describe.codes import LatentCodes
from everyscope.describe.sequences import Sequences
from everyscope.text.markers import Markers

BOS, EOS, PAD = 2, 1, 0
VOCAB, CONTEXT, BLOCKS, WIDTH = 30, 20, 24, 40


@pytest.fixture
def sequences() -> Sequences:
    """24 blocks of 20 tokens, eight documents; the last block is half padding."""
    random = np.random.default_rng(0)
    input_ids = random.integers(3, VOCAB, (BLOCKS, CONTEXT)).astype(np.int32)
    document = np.sort(random.integers(0, 8, BLOCKS * CONTEXT)).reshape(BLOCKS, CONTEXT).astype(np.int32)
    input_ids.ravel()[np.flatnonzero(np.diff(document.ravel())) + 1] = EOS
    input_ids[:, 0] = BOS
    input_ids[-1, 10:], document[-1, 10:] = PAD, -1
    document[:, 0] = -1
    mask = (input_ids >= 3) & (document >= 0)
    splits = tuple("train" if number < 12 else "held_out" for number in range(BLOCKS))
    return Sequences(
        input_ids, mask, document, splits, tuple(f"document {number}" for number in range(8)), Markers(BOS, EOS, PAD)
    )


@pytest.fixture
def dense(sequences: Sequences) -> np.ndarray:
    """Activations [places, latents], 0 where masked: some latents are rare, one is dead, one always fires, two are equal."""
    random = np.random.default_rng(1)
    f = random.exponential(size=(BLOCKS * CONTEXT, WIDTH)).astype(np.float32)
    f *= random.random(f.shape) < np.linspace(0.001, 0.6, WIDTH)
    f[:, 3] = 0
    f[:, 4] = 1 + random.random(len(f))
    f[:, 6] = f[:, 5] = f[:, 20]
    f[:, 7] = (sequences.input_ids.ravel() == 9) * 2.5
    return f * sequences.mask.ravel()[:, None]


@pytest.fixture
def codes(dense: np.ndarray) -> LatentCodes:
    return codes_of(dense)


def codes_of(dense: np.ndarray, first_place: int = 0) -> LatentCodes:
    latent, place = np.nonzero(dense.T)
    starts = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=dense.shape[1]))])
    return LatentCodes(starts, (place + first_place).astype(np.int32), dense[place, latent])


@pytest.fixture(scope="session")
def coded() -> Callable[..., LatentCodes]:
    return codes_of
