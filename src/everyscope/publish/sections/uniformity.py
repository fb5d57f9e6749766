"""How evenly active latents share in what they do for the prediction."""

from functools import partial

from matplotlib.axes import Axes

from everyscope.publish.drawing.pictures import Panel, Picture
from everyscope.publish.drawing.scales import scale_l0
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.fidelity import FidelityMeasure, draw_line
from everyscope.publish.sections.section import Section, range_text
from everyscope.sites.names import SITE_TITLES, SiteKind


def uniformity_section(evidence: Evidence) -> Section | None:
    """The share of active latents that matter, against L0; none where it was not measured."""
    found = {folder: its["uniformity"] for folder, its in evidence.metrics.items() if its["uniformity"]}
    if not found:
        return None
    measure = FidelityMeasure(
        "uniformity",
        "Uniformity of the active latents' importance",
        "exp(entropy) / L0 [1]",
        lambda sae: found[sae.folder]["r_l0"] if sae.folder in found else None,
        lambda sae: None,
        None,
    )
    panels = [Panel(SITE_TITLES[kind], partial(_draw, evidence=evidence, measure=measure, kind=kind)) for kind in evidence.kinds]
    positions = next(iter(found.values()))["num_positions"]
    shares = [its["r_l0"] for its in found.values()]
    return Section(
        anchor="uniformity",
        title="How evenly latents matter",
        basis=evidence.basis_of(positions, evidence.index.measured.data),
        says=(
            f"By entropy, {range_text(shares, '.0%')} of an SAE’s active latents matter for the next token; "
            f"{_trend(evidence, measure)}."
        ),
        notes=(
            "A latent’s importance is its activation times the gradient along its direction of the correct next token’s "
            "logit, less the mean logit. exp(entropy) is the number of latents that matter; 1 means that all active ones "
            "matter equally.",
        ),
        pictures=(Picture(measure.file, measure.title, tuple(panels), (*evidence.layer_keys, *evidence.width_keys)),),
    )


def _trend(evidence: Evidence, measure: FidelityMeasure) -> str:
    """At how many sites and widths the share falls from the sparsest SAE to the densest."""
    ends = []
    for where, width in dict.fromkeys((sae.where, sae.width) for sae in evidence.index.saes):
        here = sorted((s for s in evidence.index.saes if (s.where, s.width) == (where, width)), key=lambda sae: sae.metrics.l0)
        known = [value for sae in here if (value := measure.of(sae)) is not None]
        ends += [(known[0], known[-1])] if len(known) > 1 else []
    if not ends:
        return "with one SAE for each site and width, L0 cannot be compared"
    falls = sum(last < first for first, last in ends)
    return f"the share falls from the sparsest SAE to the densest in {falls} of {len(ends)} pairs of site and width"


def _draw(axes: Axes, *, evidence: Evidence, measure: FidelityMeasure, kind: SiteKind) -> None:
    for layer, colour in evidence.layers.items():
        for width, marker in evidence.widths.items():
            draw_line(axes, evidence.at(kind), layer, width, measure, colour, marker)
    values = [value for sae in evidence.index.saes if (value := measure.of(sae)) is not None]
    scale_l0(axes, [sae.metrics.l0 for sae in evidence.index.saes])
    axes.set_ylim(max(0.0, min(values) - 0.06), min(1.0, max(values) + 0.06))
    axes.set_ylabel(measure.label)
