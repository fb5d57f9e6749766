"""The sections of the report, in the order in which they are read."""

from collections.abc import Callable

from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.cost import cost_section
from everyscope.publish.sections.depth import depth_section
from everyscope.publish.sections.fidelity import fidelity_section
from everyscope.publish.sections.firing import firing_section
from everyscope.publish.sections.massive import massive_section
from everyscope.publish.sections.positions import positions_section
from everyscope.publish.sections.precision import precision_section
from everyscope.publish.sections.probing import probing_section
from everyscope.publish.sections.ranking import ranking_section
from everyscope.publish.sections.section import Section
from everyscope.publish.sections.splitting import splitting_section
from everyscope.publish.sections.subsets import subsets_section
from everyscope.publish.sections.transfer import transfer_section
from everyscope.publish.sections.uniformity import uniformity_section
from everyscope.publish.sections.widths import widths_section

SECTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    fidelity_section,
    massive_section,
    depth_section,
    positions_section,
    widths_section,
    splitting_section,
    transfer_section,
    subsets_section,
    precision_section,
    firing_section,
    uniformity_section,
    probing_section,
    ranking_section,
    cost_section,
)
"""Each gives None where what it shows was not measured."""


def sections_of(evidence: Evidence) -> list[Section]:
    """All sections that the evidence can fill."""
    return [section for make in SECTIONS if (section := make(evidence)) is not None]
