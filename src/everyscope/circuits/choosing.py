"""Which transcoders of a suite make a graph, and what their latents are called."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from everyscope.base.errors import ConfigError
from everyscope.base.tables import read_table
from everyscope.circuits.graph import LATENT, Graph
from everyscope.sites.names import SUBLAYERS, TRANSCODER_READS, Site, SiteKind
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import EXPLANATIONS_FILE

if TYPE_CHECKING:
    from everyscope.suite.reader import Suite, SuiteEntry

COLUMNS = ("latent", "label", "kind")
Through = Literal["transcoders", "saes"]
"""Whose latents are nodes."""
KINDS: tuple[tuple[Through, tuple[SiteKind, ...]], ...] = (
    *(("transcoders", (kind,)) for kind in TRANSCODER_READS),
    ("saes", SUBLAYERS),
)
"""Kinds of sites whose coders make one graph, in the order in which a suite is searched for them."""


def coders_of(
    suite: "Suite", through: Through | None = None, *, width: int | None = None, l0: float | None = None
) -> "list[SuiteEntry]":
    """One transcoder for each layer that has any, of what MLPs read, else of the residual stream; where none has, or `through`
    says so, one SAE for each attn_out, mlp_out and resid_post that has any.

    Of `width` (None: the widest), with the L0 nearest to `l0` (None: the canonical one). ConfigError where the suite has none.
    """
    for name, kinds in KINDS:
        by_site: dict[Site, list[SuiteEntry]] = {}
        for entry in suite:
            if through in (None, name) and entry.site.kind in kinds and width in (None, entry.width):
                by_site.setdefault(entry.site, []).append(entry)
        if by_site:
            return [_chosen(entries, l0) for _, entries in sorted(by_site.items())]
    of_width = "" if width is None else f" of width {width}"
    wanted = {None: f"transcoders{of_width}, nor SAEs", "transcoders": f"transcoders{of_width}", "saes": f"SAEs{of_width}"}[
        through
    ]
    places = "" if through == "transcoders" else f" at {', '.join(SUBLAYERS)}"
    raise ConfigError(f"{suite.root}: has no {wanted}{places}; train some with --sites transcoder")


def _chosen(entries: "list[SuiteEntry]", l0: float | None) -> "SuiteEntry":
    widest = max(entry.width for entry in entries)
    ranked = sorted((entry for entry in entries if entry.width == widest), key=lambda entry: entry.metrics.l0)
    if l0 is not None:
        return min(ranked, key=lambda entry: abs(entry.metrics.l0 - l0))
    return next((entry for entry in ranked if entry.metrics.is_canonical), ranked[len(ranked) // 2])


def labels_of(suite: Path, graph: Graph) -> dict[tuple[int, int], str]:
    """What a graph's latents are called, by coder and latent: in the suite, or else in the graph; the others are left out."""
    is_latent = graph.kind == LATENT
    found = own_labels(graph)
    for number, coder in enumerate(graph.facts.coders):
        path = suite / coder.name / EXPLANATIONS_FILE
        if path.is_file():
            wanted = set(graph.index[is_latent & (graph.coder == number)].tolist())
            found |= {(number, latent): label for latent, label in _labels(path, wanted)}
    return found


def own_labels(graph: Graph) -> dict[tuple[int, int], str]:
    """What an imported graph itself calls its latents, by coder and latent."""
    keys = zip(graph.coder[graph.kind == LATENT].tolist(), graph.index[graph.kind == LATENT].tolist(), strict=True)
    return {key: label for key in keys if (label := graph.facts.labels.get(f"{key[0]}_{key[1]}"))}


def _labels(path: Path, wanted: set[int]) -> Iterable[tuple[int, str]]:
    """The first label of each wanted latent: methods stand in order of their score."""
    table = read_table(path, COLUMNS, "download the suite again, or publish it again")
    seen: set[int] = set()
    for latent, label, kind in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
        if latent in wanted and latent not in seen and kind not in UNLABELLED and label:
            seen.add(latent)
            yield latent, label


def named(graph: Graph, node: int, labels: dict[tuple[int, int], str]) -> str:
    """A node in words, as in `L3 #417 "open brackets"`; of several SAEs in a layer with the site: `L3 mlp_out #417`."""
    kind, layer, position, index = (int(getattr(graph, name)[node]) for name in ("kind", "layer", "position", "index"))
    at = f" @ {position} {graph.facts.tokens[position]!r}"
    where = f"L{layer} {graph.facts.coders[int(graph.coder[node])].kind}" if graph.is_stacked else f"L{layer}"
    if kind == LATENT:
        label = labels.get((int(graph.coder[node]), index))
        return f"{where} #{index}{'' if label is None else f' “{label}”'}{at}"
    if graph.start[node] > 0:
        target = graph.facts.targets[int(np.flatnonzero(graph.start > 0).searchsorted(node))]
        return f"output {target.text!r} ({target.probability:.1%})"
    return f"error {where}{at}" if index == -1 else f"token{at}"
