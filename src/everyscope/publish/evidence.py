"""The data behind a report, and the choices that its sections share."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everyscope.base.progress import human_count
from everyscope.publish.drawing.palette import layer_colours, width_markers
from everyscope.publish.drawing.pictures import LegendKey
from everyscope.sites.names import SITE_KINDS, Site, SiteKind, parse_folder
from everyscope.suite.layout import width_label
from everyscope.suite.records import SaeRecord, SuiteIndex

MAX_KEYS = 8
"""Layers that a legend names; of more, the first, the last, and some between."""


@dataclass(frozen=True)
class Evidence:
    """A suite's records, and what is too much for suite.json."""

    index: SuiteIndex
    metrics: dict[str, dict[str, Any]]
    """metrics.json of each SAE, by its folder."""
    slices: dict[str, Any]
    """Each slice's content, by its name; absent where it was not measured."""
    cost: dict[str, Any] | None

    @cached_property
    def basis(self) -> str:
        """Tokens, data and mask, for titles."""
        return self.basis_of(self.index.measured.num_tokens, self.index.measured.data)

    def basis_of(self, num_tokens: int | None, data: str) -> str:
        """The same for what was measured on other text, or on less of it; without tokens where their number is unknown."""
        counted = "" if num_tokens is None else f"{human_count(num_tokens)} tokens · "
        return f"{counted}{data} · {self.index.measured.mask}"

    @cached_property
    def interval_note(self) -> str:
        """What bars and brackets are."""
        measured = self.index.measured
        return f"Bars are {measured.interval_level:.0%} intervals, bootstrapped over {measured.num_documents:,} documents."

    @cached_property
    def kinds(self) -> list[SiteKind]:
        """The kinds of site in the suite, in the order of the house."""
        present = {sae.site for sae in self.index.saes}
        return [kind for kind in SITE_KINDS if kind in present]

    @cached_property
    def canonical(self) -> list[SaeRecord]:
        """The SAEs that stand for their site and width, in the suite's order."""
        return [sae for sae in self.index.saes if sae.metrics.is_canonical]

    @cached_property
    def chosen(self) -> list[SaeRecord]:
        """One canonical SAE for each site, of its narrowest width."""
        found: dict[Site, SaeRecord] = {}
        for sae in sorted(self.canonical, key=lambda sae: (sae.where, sae.width)):
            found.setdefault(sae.where, sae)
        return list(found.values())

    @cached_property
    def layers(self) -> dict[int, str]:
        """A colour for each layer."""
        return layer_colours(sae.layer for sae in self.index.saes)

    @cached_property
    def widths(self) -> dict[int, str]:
        """A marker for each width."""
        return width_markers(sae.width for sae in self.index.saes)

    @cached_property
    def layer_keys(self) -> list[LegendKey]:
        """The layers' lines in a legend."""
        layers = list(self.layers)
        if len(layers) > MAX_KEYS:
            layers = sorted({layers[round(place * (len(layers) - 1) / (MAX_KEYS - 1))] for place in range(MAX_KEYS)})
        return [LegendKey(f"layer {layer}", self.layers[layer], line="solid") for layer in layers]

    @cached_property
    def width_keys(self) -> list[LegendKey]:
        """The widths' markers in a legend."""
        return [LegendKey(f"width {width_label(width)}", marker=marker) for width, marker in self.widths.items()]

    def at(self, kind: SiteKind) -> list[SaeRecord]:
        """All SAEs at one kind of site."""
        return [sae for sae in self.index.saes if sae.site == kind]


def kind_of(row: dict[str, Any]) -> SiteKind:
    """The kind of site of a slice's row."""
    return parse_folder(row["site"]).kind


def layer_of(row: dict[str, Any]) -> int:
    """The layer of a slice's row."""
    return parse_folder(row["site"]).layer


def present(rows: Iterable[dict[str, Any]]) -> list[SiteKind]:
    """The kinds of site among a slice's rows, in the order of the house."""
    found = {kind_of(row) for row in rows}
    return [kind for kind in SITE_KINDS if kind in found]
