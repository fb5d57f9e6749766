"""Intervals of an SAE's headline numbers, each a ratio of sums over resampled documents."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from everyscope.evaluate.bootstrap import Resampler
from everyscope.evaluate.groups import Tables, variance
from everyscope.evaluate.segments import SEGMENTS, Segment
from everyscope.evaluate.sums import SaeSums


@dataclass(frozen=True)
class SiteResamples:
    """What all SAEs of a site share, in each resample."""

    resampler: Resampler
    rows: Float[Tensor, " resamples"]
    """Rows [tokens]."""
    variance: Float[Tensor, " resamples"]
    """sum ||x - mean||^2 about the resample's own mean."""
    positions: Float[Tensor, " resamples"]
    """Positions that count for the loss [tokens]."""
    clean: Float[Tensor, " resamples"]
    """Loss of the untouched model [nats]."""
    mean_ablated: Float[Tensor, " resamples"]
    """Loss with the site's activations replaced by the training mean [nats]."""


def resample_site(resampler: Resampler, moments: Tables, clean: Tables, ablated: Tables) -> SiteResamples:
    """The sums of a site in each resample."""
    columns, losses = resampler.sums(moments.axes["document"]), resampler.sums(clean.axes["document"])
    ablations = resampler.sums(ablated.axes["document"])
    return SiteResamples(resampler, columns[:, 0], variance(columns), losses[:, 0], losses[:, 1], ablations[:, 1])


def intervals_of(sae: SaeSums, site: SiteResamples) -> dict[str, list[float] | None]:
    """[low, high] of each headline number; None with one document, or where a resample leaves a ratio undefined."""
    rows, losses = site.resampler.sums(sae.rows.axes["document"]), site.resampler.sums(sae.losses.axes["document"])
    values = {
        "l0": rows[:, 2] / site.rows,
        "fvu": rows[:, 0] / site.variance,
        "delta_loss": (losses[:, 0] - site.clean) / site.positions,
        "kl": losses[:, 1] / site.positions,
        "loss_recovered": (site.mean_ablated - losses[:, 0]) / (site.mean_ablated - site.clean),
        "cosine": rows[:, 1] / site.rows,
    }
    return {name: site.resampler.interval(value) for name, value in values.items()}


def segment_intervals(
    sae: SaeSums, moments: Tables, clean: Tables, resampler: Resampler
) -> dict[Segment, dict[str, list[float] | None]]:
    """[low, high] of what each side's own numbers are, over the same resampled documents."""
    found = {}
    for at, segment in enumerate(SEGMENTS):
        columns, rows, losses, before = (
            resampler.sums(table.axes["turn"].unflatten(0, (-1, len(SEGMENTS)))[:, at])
            for table in (moments, sae.rows, sae.losses, clean)
        )
        values = {
            "l0": rows[:, 2] / columns[:, 0],
            "fvu": rows[:, 0] / variance(columns),
            "delta_loss": (losses[:, 0] - before[:, 1]) / before[:, 0],
        }
        found[segment] = {name: resampler.interval(value) for name, value in values.items()}
    return found
