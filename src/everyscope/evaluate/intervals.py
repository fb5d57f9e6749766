"""Intervals of an SAE's headline numbers, each a ratio of sums over resampled documents."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from everyscope.evaluate.bootstrap import Resampler
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.groups import Tables, variance
from everyscope.evaluate.segments import SEGMENTS, Segment
from everyscope.evaluate.sums import SaeState, SaeSums
from everyscope.sites.names import Site


@dataclass(frozen=True)
class SiteResamples:
    """What all SAEs of a site share, in each resample."""

    resampler: Resampler
    rows: Float[Tensor, " resamples"]
    """Usual rows [tokens]."""
    variance: Float[Tensor, " resamples"]
    """sum ||x - mean||^2 of usual rows about the resample's own mean."""
    whole_variance: Float[Tensor, " resamples"]
    """The same of all rows."""
    positions: Float[Tensor, " resamples"]
    """Positions that count for the loss [tokens]."""
    clean: Float[Tensor, " resamples"]
    """Loss of the untouched model [nats]."""
    ablations: "AblationResamples | None"
    """What the ablations cost; None where no block was spliced with them."""


@dataclass(frozen=True)
class AblationResamples:
    """The losses of the documents in which ablations were spliced, in resamples of those alone."""

    resampler: Resampler
    units: Bool[Tensor, " units"]
    """Which documents these are."""
    clean: Float[Tensor, " resamples"]
    """Loss of the untouched model [nats]."""
    zero: Float[Tensor, " resamples"]
    """Loss with the site's activations replaced by zeros [nats]."""
    mean: Float[Tensor, " resamples"]
    """The same with the training mean [nats]."""
    positions: Float[Tensor, " resamples"]
    """Positions that count [tokens]."""


def resample_site(resampler: Resampler, state: SaeState, site: Site, ablations: AblationResamples | None) -> SiteResamples:
    """The sums of a site in each resample."""
    usual, losses = state.sites[site].axes["document"], resampler.sums(state.clean.axes["document"])
    columns, whole = resampler.sums(usual), variance(resampler.sums(usual + state.massive[site].axes["document"]))
    return SiteResamples(resampler, columns[:, 0], variance(columns), whole, losses[:, 0], losses[:, 1], ablations)


def resample_ablations(config: EvaluateConfig, head: Tables, ablated: Tables) -> AblationResamples | None:
    """What a site's ablations cost in each resample of the documents of `head`."""
    clean = head.axes["document"].cpu()
    units = clean[:, 0] > 0
    if not units.any():
        return None
    resampler = Resampler(int(units.sum()), config.resamples, config.interval_level, config.seed)
    sums, spliced = resampler.sums(clean[units]), resampler.sums(ablated.axes["document"].cpu()[units])
    return AblationResamples(resampler, units, sums[:, 1], spliced[:, 0], spliced[:, 1], sums[:, 0])


def intervals_of(sae: SaeSums, site: SiteResamples) -> dict[str, list[float] | None]:
    """[low, high] of each headline number; None with one document, or where a resample leaves a ratio undefined."""
    rows, losses = site.resampler.sums(sae.rows.axes["document"]), site.resampler.sums(sae.losses.axes["document"])
    errors = site.resampler.sums(sae.rows.axes["document"] + sae.massive_rows.axes["document"])[:, 0]
    values = {
        "l0": rows[:, 2] / site.rows,
        "fvu": errors / site.whole_variance,
        "fvu_usual": rows[:, 0] / site.variance,
        "delta_loss": (losses[:, 0] - site.clean) / site.positions,
        "kl": losses[:, 1] / site.positions,
        "cosine": rows[:, 1] / site.rows,
    }
    found = {name: site.resampler.interval(value) for name, value in values.items()}
    return found | ablation_intervals(sae, site.ablations)


def ablation_intervals(sae: SaeSums, site: AblationResamples | None) -> dict[str, list[float] | None]:
    """The same of what ablations cost, and of the share of the mean's that the SAE recovers."""
    names = ("delta_loss_zero", "delta_loss_mean", "loss_recovered")
    if site is None:
        return dict.fromkeys(names)
    spliced = site.resampler.sums(sae.head.axes["document"].cpu()[site.units])[:, 0]
    costs = site.zero - site.clean, site.mean - site.clean
    values = (costs[0] / site.positions, costs[1] / site.positions, (site.mean - spliced) / costs[1])
    return {name: site.resampler.interval(value) for name, value in zip(names, values, strict=True)}


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
            "fvu_usual": rows[:, 0] / variance(columns),
            "delta_loss": (losses[:, 0] - before[:, 1]) / before[:, 0],
        }
        found[segment] = {name: resampler.interval(value) for name, value in values.items()}
    return found
