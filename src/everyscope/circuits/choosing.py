"""Which transcoders of a suite make a graph, and what their latents are called."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everyscope.base.errors import ConfigError
from everyscope.base.tables import read_table
from everyscope.circuits.graph import LATENT, Graph
from everyscope.sites.names import TRANSCODER_READS
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import EXPLANATIONS_FILE

if TYPE_CHECKING:
    from everyscope.suite.reader import Suite, SuiteEntry

COLUMNS = ("latent", "label", "kind")


def coders_of(suite: "Suite", *, width: int | None = None, l0: float | None = None) -> "list[SuiteEntry]":
    """One transcoder for each layer that has any, of what MLPs read, else of the residual stream; else one SAE of that stream.

    Of `width` (None: the widest), with the L0 nearest to `l0` (None: the canonical one). ConfigError where the suite has neither.
    """
    for kind in (*TRANSCODER_READS, "resid_post"):
        by_layer: dict[int, list[SuiteEntry]] = {}
        for entry in suite:
            if entry.site.kind == kind and width in (None, entry.width):
                by_layer.setdefault(entry.site.layer, []).append(entry)
        if by_layer:
            return [_chosen(entries, l0) for _, entries in sorted(by_layer.items())]
    of_width = "" if width is None else f" of width {width}"
    raise ConfigError(f"{suite.root}: has no transcoders{of_width}, nor SAEs at resid_post; train some with --sites transcoder")


def _chosen(entries: "list[SuiteEntry]", l0: float | None) -> "SuiteEntry":
    widest = max(entry.width for entry in entries)
    ranked = sorted((entry for entry in entries if entry.width == widest), key=lambda entry: entry.metrics.l0)
    if l0 is not None:
        return min(ranked, key=lambda entry: abs(entry.metrics.l0 - l0))
    return next((entry for entry in ranked if entry.metrics.is_canonical), ranked[len(ranked) // 2])


def labels_of(suite: Path, graph: Graph) -> dict[tuple[int, int], str]:
    """What a graph's latents are called in the suite, by coder and latent; those without a label are left out."""
    is_latent = graph.kind == LATENT
    found: dict[tuple[int, int], str] = {}
    for number, coder in enumerate(graph.facts.coders):
        path = suite / coder.name / EXPLANATIONS_FILE
        if path.is_file():
            wanted = set(graph.index[is_latent & (graph.coder == number)].tolist())
            found |= {(number, latent): label for latent, label in _labels(path, wanted)}
    return found


def _labels(path: Path, wanted: set[int]) -> Iterable[tuple[int, str]]:
    """The first label of each wanted latent: methods stand in order of their score."""
    table = read_table(path, COLUMNS, "download the suite again, or publish it again")
    seen: set[int] = set()
    for latent, label, kind in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
        if latent in wanted and latent not in seen and kind not in UNLABELLED and label:
            seen.add(latent)
            yield latent, label


def named(graph: Graph, node: int, labels: dict[tuple[int, int], str]) -> str:
    """A node in words, as in `L3 #417 "open brackets"`."""
    kind, layer, position, index = (int(getattr(graph, name)[node]) for name in ("kind", "layer", "position", "index"))
    at = f" @ {position} {graph.facts.tokens[position]!r}"
    if kind == LATENT:
        label = labels.get((int(graph.coder[node]), index))
        return f"L{layer} #{index}{'' if label is None else f' “{label}”'}{at}"
    if graph.start[node] > 0:
        target = graph.facts.targets[int(np.flatnonzero(graph.start > 0).searchsorted(node))]
        return f"output {target.text!r} ({target.probability:.1%})"
    return f"error L{layer}{at}" if index == -1 else f"token{at}"
