"""One SAE's numbers taken apart: by position, by speaker, by firing frequency; and what massive rows hold. Plain JSON
values.

The FVU of a part is that part's own: its errors over its variance about its own mean, as if it were the whole data set.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from everyscope.evaluate.groups import Tables, variance
from everyscope.evaluate.segments import SEGMENTS
from everyscope.evaluate.sums import SaeSums
from everyscope.sae.metrics import ReconstructionSums

FIRING_EDGES = tuple(step / 4 for step in range(-32, 1))
"""Edges of the histogram of latents' frequencies [log10 of the share of tokens]."""
DENSE = {"dense_1": 0.01, "dense_10": 0.1}
"""Names of the shares of latents that fire on more than these shares of the tokens [1]."""
ROUNDING = 1e-12
"""A remaining variance below this share of the total is rounding error [1]."""


def ratio(above: float, below: float) -> float | None:
    """The quotient; None where nothing is below."""
    return above / below if below else None


def part_fvu(error: float, sums: Float[Tensor, " columns"]) -> float | None:
    """FVU of a part from its errors and its moments; None where it has fewer than two rows or they are all the same."""
    spread = float(variance(sums))
    return error / spread if float(sums[0]) > 1 and spread > ROUNDING * float(sums[1]) else None


def by_position(sae: SaeSums, site: Tables, clean: Tables) -> dict[str, list[Any]]:
    """Error, FVU and delta loss at each position that has rows; delta loss null where no position counts for the loss."""
    moments, rows = site.axes["position"].cpu(), sae.rows.axes["position"].cpu()
    losses, before = sae.losses.axes["position"].cpu(), clean.axes["position"].cpu()
    found = [position for position in range(len(moments)) if float(moments[position, 0])]
    return {
        "position": found,
        "count": [int(moments[position, 0]) for position in found],
        "error": [float(rows[position, 0] / moments[position, 0]) for position in found],
        "fvu": [part_fvu(float(rows[position, 0]), moments[position]) for position in found],
        "delta_loss": [ratio(float(losses[position, 0] - before[position, 1]), float(before[position, 0])) for position in found],
        "loss_count": [int(before[position, 0]) for position in found],
    }


def by_segment(sae: SaeSums, site: Tables, clean: Tables) -> dict[str, dict[str, Any]]:
    """FVU, delta loss and L0 where the user speaks and where the model does; a loss belongs to who says the predicted token."""
    moments, rows = site.axes["segment"].cpu(), sae.rows.axes["segment"].cpu()
    losses, before = sae.losses.axes["segment"].cpu(), clean.axes["segment"].cpu()
    return {
        name: {
            "fvu_usual": part_fvu(float(rows[at, 0]), moments[at]),
            "delta_loss": ratio(float(losses[at, 0] - before[at, 1]), float(before[at, 0])),
            "l0": ratio(float(rows[at, 2]), float(moments[at, 0])),
            "num_tokens": int(moments[at, 0]),
        }
        for at, name in enumerate(SEGMENTS)
    }


def massive(sae: SaeSums, max_norm: float | None, norm_limit: float) -> dict[str, Any]:
    """Tokens of a norm above `norm_limit`: their share of the sum of squares and of the variance, and latents that fire there."""
    whole, rows = sae.reconstruction.merged(sae.massive), sae.massive
    offset = whole.shifted_sum / whole.count
    about_mean = rows.shifted_squares - 2 * rows.shifted_sum @ offset + rows.count * offset.square().sum()
    return {
        "max_norm": max_norm,
        "norm_limit": norm_limit if math.isfinite(norm_limit) else None,
        "num_tokens": int(rows.count),
        "share_of_tokens": int(rows.count) / whole.num_tokens,
        "share_of_squares": ratio(float(rows.squares), float(whole.squares)),
        "share_of_variance": ratio(float(about_mean), whole.centred_squares),
        "l0": ratio(float(rows.firings.sum()), float(rows.count)),
    }


def firing(sums: ReconstructionSums) -> dict[str, Any]:
    """The histogram of latents' frequencies, without those that never fire, and the shares of dead and dense latents."""
    frequencies = sums.frequencies.cpu().numpy()
    alive = np.log10(frequencies[frequencies > 0]).clip(FIRING_EDGES[0], FIRING_EDGES[-1])
    found: dict[str, Any] = {
        "log10_edges": list(FIRING_EDGES),
        "counts": np.histogram(alive, bins=FIRING_EDGES)[0].tolist(),
        "dead": sums.dead_fraction,
    }
    found |= {name: float((frequencies > bound).mean()) for name, bound in DENSE.items()}
    dense = frequencies[frequencies > DENSE["dense_10"]].sum()
    return found | {"dense_10_share_of_l0": ratio(float(dense), float(frequencies.sum()))}
