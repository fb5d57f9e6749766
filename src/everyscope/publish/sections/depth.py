"""By layer: what the canonical SAEs reach."""

from collections.abc import Iterator
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from everyscope.publish.drawing.palette import DASHES, NEUTRAL, SITE_COLOURS, SITE_MARKERS
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.drawing.scales import bars, scale_value
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.fidelity import DELTA_LOSS, FVU, FidelityMeasure
from everyscope.publish.sections.section import Section
from everyscope.sites.names import SITE_TITLES
from everyscope.suite.layout import width_label
from everyscope.suite.records import SaeRecord

RECOVERED = FidelityMeasure(
    "loss_recovered",
    "Loss recovered",
    "Loss recovered [1]",
    lambda sae: sae.metrics.loss_recovered,
    lambda sae: sae.metrics.intervals.loss_recovered,
    None,
)
MEASURES = ((DELTA_LOSS, "Delta loss"), (FVU, "FVU"), (RECOVERED, "Loss recovered"))


def depth_section(evidence: Evidence) -> Section | None:
    """Metrics by layer; none for SAEs of a single layer."""
    layers = sorted({sae.layer for sae in evidence.canonical})
    if len(layers) < 2:
        return None
    widths = list(dict.fromkeys(sorted(sae.width for sae in evidence.canonical)))
    lines = {width: DASHES[place % len(DASHES)] for place, width in enumerate(widths)}
    panels = [Panel(title, partial(_draw, evidence=evidence, measure=measure, lines=lines)) for measure, title in MEASURES]
    keys = [LegendKey(SITE_TITLES[kind], SITE_COLOURS[kind], SITE_MARKERS[kind]) for kind in evidence.kinds]
    keys += [LegendKey(f"width {width_label(width)}", NEUTRAL, line=line) for width, line in lines.items()]
    worst = max(evidence.canonical, key=lambda sae: sae.metrics.delta_loss)
    best = min(evidence.canonical, key=lambda sae: sae.metrics.delta_loss)
    return Section(
        anchor="depth",
        title="By layer",
        basis=evidence.basis,
        says=(
            f"Of the canonical SAEs, {worst.where} at width {width_label(worst.width)} costs the model most "
            f"({worst.metrics.delta_loss:.3f} nats/token), {best.where} at width {width_label(best.width)} least "
            f"({best.metrics.delta_loss:.3f})."
        ),
        notes=(
            "Loss recovered is 1 where splicing costs nothing, and 0 where it costs as much as the site’s training mean. "
            f"{evidence.interval_note}",
        ),
        pictures=(Picture("by_layer", "The canonical SAE of each site and width, by layer", tuple(panels), tuple(keys)),),
    )


def _draw(axes: Axes, *, evidence: Evidence, measure: FidelityMeasure, lines: dict) -> None:
    drawn, tops = [], []
    for sites, line in _lines(evidence, lines):
        known = [(sae, value) for sae in sites if (value := measure.of(sae)) is not None]
        if not known:
            continue
        values = [value for _, value in known]
        kind = known[0][0].site
        axes.errorbar(
            [sae.layer for sae, _ in known],
            values,
            yerr=bars(values, [measure.interval(sae) for sae, _ in known]),
            color=SITE_COLOURS[kind],
            marker=SITE_MARKERS[kind],
            linestyle=line,
            elinewidth=0.8,
            linewidth=1.3,
        )
        drawn += values
        tops += [max(interval) for sae, _ in known if (interval := measure.interval(sae)) is not None]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("Layer")
    if measure is RECOVERED and drawn and min(drawn) > 0.5:
        axes.set_ylim(min(drawn) - 0.1 * (1 - min(drawn)) - 0.005, 1.002)
    else:
        scale_value(axes, [*drawn, *tops], is_logarithmic=measure is DELTA_LOSS)
    axes.set_ylabel(measure.label)


def _lines(evidence: Evidence, lines: dict) -> Iterator[tuple[list[SaeRecord], object]]:
    """The canonical SAEs of one kind of site and one width, by layer, and their line style."""
    for kind in evidence.kinds:
        for width, line in lines.items():
            yield [sae for sae in evidence.canonical if (sae.site, sae.width) == (kind, width)], line
