"""One SAE's numbers taken apart: by position, by who speaks, by norm, by how often latents fire. Plain JSON values.

The FVU of a part is that part's own: its errors over its variance about its own mean, as if it were the whole data set.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from everyscope.evaluate.groups import Tables, variance
from everyscope.evaluate.segments import SEGMENTS
from everyscope.evaluate.sums import SaeSums
from everyscope.sae.metrics import ReconstructionSums, centred_squares

FIRING_EDGES = tuple(step / 4 for step in range(-32, 1))
"""Edges of the histogram of latents' frequencies [log10 of the share of tokens]."""
DENSE = {"dense_1": 0.01, "dense_10": 0.1}
"""Names of the shares of latents that fire on more than so many of the tokens [1]."""
ROUNDING = 1e-12
"""A variance that is a smaller share of what it is the rest of is rounding error [1]."""


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
            "fvu": part_fvu(float(rows[at, 0]), moments[at]),
            "delta_loss": ratio(float(losses[at, 0] - before[at, 1]), float(before[at, 0])),
            "l0": ratio(float(rows[at, 2]), float(moments[at, 0])),
            "num_tokens": int(moments[at, 0]),
        }
        for at, name in enumerate(SEGMENTS)
    }


def high_norm(sae: SaeSums, site: Tables, threshold: float) -> dict[str, Any]:
    """What tokens of a norm above `threshold` hold of the variance, and the FVU of all others."""
    moments, rows = site.axes["norm"].cpu(), sae.rows.axes["norm"].cpu()
    whole, large = moments.sum(0), moments[1]
    offset = whole[2:] / whole[0]
    about_mean = large[1] - 2 * large[2:] @ offset + large[0] * offset.square().sum()
    return {
        "share_of_variance": ratio(float(about_mean), float(centred_squares(whole[0], whole[2:], whole[1]))),
        "fvu_without": part_fvu(float(rows[0, 0]), moments[0]),
        "num_tokens": int(large[0]),
        "norm_threshold": threshold,
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
