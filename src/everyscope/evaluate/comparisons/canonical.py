"""The SAE that stands for its site and width where a comparison cannot show all."""

from collections.abc import Iterable

from everyscope.evaluate.comparisons.scored import Scored
from everyscope.sites.names import Site


def canonical_saes(scored: Iterable[Scored], l0: float) -> dict[tuple[Site, int], Scored]:
    """For each site and width [latents], in order, the SAE whose L0 is nearest to `l0` [latents]; of equals the first by name."""
    found: dict[tuple[Site, int], Scored] = {}
    for one in sorted(scored, key=lambda one: (one.site, one.width, abs(one.l0 - l0), one.name)):
        found.setdefault((one.site, one.width), one)
    return found


def canonical_of_sites(scored: Iterable[Scored], l0: float) -> list[Scored]:
    """One SAE for each site, in order: the canonical one of its smallest width, as in Gemma Scope."""
    found: dict[Site, Scored] = {}
    for (site, _), one in canonical_saes(scored, l0).items():
        found.setdefault(site, one)
    return list(found.values())
