"""Training SAEs on activations that somebody already has, in memory: nothing is written."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from everyscope.base.progress import meter
from everyscope.sae.config import SaeConfig
from everyscope.sae.folded import Sae
from everyscope.sae.trainable import fold
from everyscope.shards.norms import MAX_NORM
from everyscope.stream.local import ArraySource
from everyscope.stream.source import Source
from everyscope.train.bank import Bank, normalisation_for
from everyscope.train.run import fit


def train_saes(
    activations: "np.ndarray | Tensor | Source",
    configs: Sequence[SaeConfig],
    *,
    num_tokens: int,
    batch_rows: int = 4096,
    max_norm: float | None = MAX_NORM,
    seed: int = 0,
    device: str = "cpu",
) -> list[Sae]:
    """Train one SAE per config on raw activations [rows, d_in], or on any Source, and return them folded.

    All SAEs see the same batches of `batch_rows` rows, `num_tokens` rows in all; `seed` shuffles an array once. Rows whose norm
    is above `max_norm` times the median norm are left out; None keeps all. Raises ShapeMismatch and NonFinite for arrays that are
    no activations, DataError where all rows are equal.
    """
    source = ArraySource(activations, seed) if isinstance(activations, np.ndarray | Tensor) else activations
    normalisation = normalisation_for(configs, source.statistics, max_norm)
    bank = Bank(configs, source.d_in, normalisation, num_tokens // batch_rows, device)
    with meter("train", bank.steps, "steps") as progress:
        fit(bank, source, batch_rows, [lambda bank, losses: progress.advance()])
    return [fold(sae, normalisation) for sae in bank.saes]
