"""What an SAE's page shows: its numbers beside their baselines, its curves, and the table of its latents."""

from typing import Any

import numpy as np
from markupsafe import Markup

from everyscope.browse.links import Links
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts, packed
from everyscope.browse.svg.charts import Curve, Estimate, curves, estimates, histogram
from everyscope.browse.table_page import PAGE, TablePage, TableRequest, latent_page, sorted_by
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import width_label
from everyscope.suite.positions import position_delta_loss, position_fvu
from everyscope.suite.records import beaten_by
from everyscope.suite.terms import TERMS

BASELINES = {
    "zero": "zero",
    "mean": "mean",
    "pca": "PCA, L0 parts",
    "random_dictionary": "random dictionary",
    "neuron_basis": "neurons",
    "linear": "linear map",
    "random_model": "random model",
}
"""The baselines that metrics.json may have, and what to call them."""
NUMBERS = (
    "l0",
    "fvu_usual",
    "fvu",
    "delta_loss",
    "loss_recovered",
    "kl",
    "cosine",
    "l2_ratio",
    "mse",
    "fvu_uncentred",
    "reconstruction_bias",
    "dead_fraction",
    "dense_fraction",
    "loss_clean",
    "loss_spliced",
    "loss_mean_ablated",
    "loss_zero_ablated",
)
"""Rows of the table of numbers, where they were measured."""
COLUMNS = (
    ("latent", "Latent", "", "latent"),
    ("", "Label", "wide", "labels"),
    ("", "Most on", "left", ""),
    ("frequency", "Frequency", "", "frequency"),
    ("max_activation", "Max", "", "max_activation"),
    ("mean_activation", "Mean", "", "mean_activation"),
    ("entropy", "Entropy", "", "entropy"),
    ("predictability", "Token", "", "predictability"),
    ("nearest", "Nearest", "", "nearest"),
    ("detection", "Detection", "", "detection"),
    ("fuzzing", "Fuzzing", "", "fuzzing"),
)
"""Columns of the table of latents: what they sort by, title, class, and their name among TERMS."""


def sae_view(index: Index, links: Links, sae: SaeFacts, request: TableRequest) -> dict[str, Any]:
    """Everything on the page of one SAE."""
    index.require(sae)
    metrics = index.metrics(sae)
    page = latent_page(index, sae, request)
    num_pages = max(1, -(-page.total // PAGE))
    return {
        "sae": sae,
        "metrics": metrics,
        "numbers": numbers(metrics),
        "basis": basis(metrics),
        "warnings": warnings(metrics),
        "baselines": _baselines(metrics),
        "positions": _positions(metrics),
        "firing": _firing(index, sae, metrics),
        "siblings": _siblings(index, sae, links),
        "request": request,
        "columns": _columns(sae, page, request, links),
        "rows": table_rows(index, page.rows, links),
        "page_found": page,
        "num_pages": num_pages,
        "turns": {
            name: links.sae(sae.folder, {**request.query, "page": str(number) if number > 1 else ""})
            if 1 <= number <= num_pages
            else None
            for name, number in (("before", request.page - 1), ("after", request.page + 1))
        },
    }


def basis(metrics: dict[str, Any]) -> str:
    """On what the numbers rest."""
    tokens = f"{metrics['num_tokens']:,} tokens" if metrics.get("num_tokens") else ""
    documents = f"{metrics['num_documents']:,} documents" if metrics.get("num_documents") else ""
    return " · ".join(part for part in (tokens, documents, metrics.get("data"), metrics.get("mask")) if part)


def numbers(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of numbers: name, value and interval."""
    intervals = metrics.get("intervals") or {}
    return [
        {"name": name, "title": TERMS[name].heading.removesuffix(" [1]"), "value": metrics[name], "interval": intervals.get(name)}
        for name in NUMBERS
        if metrics.get(name) is not None and (name != "fvu" or metrics["fvu"] != metrics["fvu_usual"])
    ]


def warnings(metrics: dict[str, Any]) -> list[str]:
    """What must be known of the numbers: massive tokens, baselines that do better; a sentence each."""
    found, massive = [], metrics.get("massive") or {}
    if massive.get("num_tokens"):
        found.append(
            f"{massive['num_tokens']:,} tokens have massive activations, {massive['share_of_squares']:.0%} of the sum of "
            "squares; they count in plain FVU alone."
        )
    rivals = beaten_by(metrics["fvu_usual"], metrics.get("baselines_fvu") or {})
    if rivals:
        found.append(f"Undertrained: {' and '.join(rivals)} of its L0 leave less variance unexplained.")
    return found


def _baselines(metrics: dict[str, Any]) -> list[tuple[str, Markup]]:
    """FVU and delta loss beside the same of each baseline."""
    measured = dict(metrics.get("baselines") or {})
    if not measured and metrics.get("fvu_pca_usual") is not None:
        measured = {"pca": {"fvu_usual": metrics["fvu_pca_usual"]}}
    figures = []
    for name, unit in (("fvu_usual", "FVU [1]"), ("delta_loss", "delta loss [nats/token]")):
        older = name.removesuffix("_usual")
        found = [
            Estimate(BASELINES[key], value.get(name, value.get(older)), None, True)
            for key, value in measured.items()
            if key in BASELINES
        ]
        found = [item for item in found if item.value is not None]
        if found and metrics.get(name) is not None:
            interval = (metrics.get("intervals") or {}).get(name)
            own = Estimate("this SAE", metrics[name], tuple(interval) if interval else None, False)
            figures.append((unit, estimates([own, *found], unit, f"{unit} of this SAE and of baselines")))
    return figures


def _positions(metrics: dict[str, Any]) -> list[tuple[str, Markup]]:
    """FVU and delta loss over stretches of positions."""
    figures = []
    for unit, points in position_curves(metrics):
        svg = curves([Curve("token", points)], "token of the block", unit, f"{unit} by position", x_log=True)
        figures.append((unit, svg))
    return figures


def position_curves(metrics: dict[str, Any]) -> list[tuple[str, list[tuple[float, float | None]]]]:
    """Unit and points of each curve over positions that was measured."""
    found = []
    for unit, of in (("FVU [1]", position_fvu), ("delta loss [nats/token]", position_delta_loss)):
        try:
            tokens, values = of(metrics)
        except (KeyError, TypeError, ValueError):  # a suite of somebody else's, or of an earlier form
            continue
        if len(tokens):
            found.append((unit, list(zip(tokens.tolist(), values.tolist(), strict=True))))
    return found


def _firing(index: Index, sae: SaeFacts, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The histogram of log10 frequency, as measured or else as the table of latents has it."""
    measured = metrics.get("firing") or {}
    edges, counts = measured.get("log10_edges"), measured.get("counts")
    if not edges or not counts:
        frequencies = index.frequencies(sae)
        if not (frequencies > 0).any():
            return None
        logs = np.log10(frequencies[frequencies > 0])
        found, at = np.histogram(logs, bins=30, range=(np.floor(logs.min()), 0.0))
        edges, counts = at.tolist(), found.tolist()
    svg = histogram(edges, counts, "log₁₀ frequency", "latents", "Latents by how often they fire")
    return {"svg": svg, "facts": measured}


def _siblings(index: Index, sae: SaeFacts, links: Links) -> list[dict[str, Any]]:
    """The SAEs beside this one: other sparsities, other widths, other layers, other sites, each by its nearest L0."""

    def nearest(found: list[SaeFacts]) -> SaeFacts:
        return min(found, key=lambda other: (abs(other.headline["l0"] - sae.headline["l0"]), other.number))

    here = [other for other in index.saes if other.site == sae.site]
    same = [other for other in here if other.width == sae.width]
    groups = [("L0", [(f"{other.headline['l0']:.3g}", other) for other in same])]
    widths = sorted({other.width for other in here})
    by_width = {width: [other for other in here if other.width == width] for width in widths}
    groups.append(("Width", [(width_label(width), sae if width == sae.width else nearest(by_width[width])) for width in widths]))
    alike = [other for other in index.saes if other.width == sae.width]
    by_layer: dict[int, list[SaeFacts]] = {}
    by_kind: dict[str, list[SaeFacts]] = {}
    for other in alike:
        if other.site.kind == sae.site.kind:
            by_layer.setdefault(other.site.layer, []).append(other)
        if other.site.layer == sae.site.layer:
            by_kind.setdefault(other.site.kind, []).append(other)
    layers = [(str(layer), sae if layer == sae.site.layer else nearest(found)) for layer, found in sorted(by_layer.items())]
    kinds = [(kind, sae if kind == sae.site.kind else nearest(found)) for kind, found in by_kind.items()]
    groups += [("Layer", layers), ("Site", kinds)]
    return [
        {
            "title": title,
            "items": [{"text": text, "href": links.sae(other.folder), "is_here": other is sae} for text, other in items],
        }
        for title, items in groups
        if len(items) > 1
    ]


def _columns(sae: SaeFacts, page: TablePage, request: TableRequest, links: Links) -> list[dict[str, Any]]:
    """The heads of the table of latents, each with the address that sorts by it; empty columns are left out."""
    found = []
    for name, title, kind, note in COLUMNS:
        if (title == "Label" or name in ("detection", "fuzzing")) and not sae.num_labels:
            continue
        if name in ("entropy", "predictability", "nearest") and not sae.is_described:
            continue
        if title == "Most on" and not sae.is_described:
            continue
        is_here = bool(name) and name == sorted_by(sae, request)
        direction = "up" if is_here and request.is_descending else ""
        query = {**request.query, "sort": name, "order": direction, "page": ""}
        found.append(
            {
                "name": name,
                "title": title,
                "kind": kind,
                "note": TERMS[note].means if note else "The tokens on which it fires most",
                "is_here": is_here,
                "href": links.sae(sae.folder, query) if name else None,
            }
        )
    return found


def table_rows(index: Index, rows: list[dict[str, Any]], links: Links) -> list[dict[str, Any]]:
    """Rows of the index with their addresses and readable tokens; tokens that stand for a label are no label."""
    tokens = [packed(row["top_tokens"], np.int32).tolist() for row in rows]
    pieces: dict[int, Piece] = index.pieces(token for found in tokens for token in found)
    shown = []
    for row, found in zip(rows, tokens, strict=True):
        sae = index.saes[row["sae"]]
        label = None if row["kind"] in UNLABELLED else row["label"]
        top = [pieces[token] for token in found]
        shown.append({**row, "label": label, "facts": sae, "href": links.latent(sae.folder, row["latent"]), "top": top})
    return shown
