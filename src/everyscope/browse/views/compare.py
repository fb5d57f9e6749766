"""What the page of two SAEs shows: their numbers side by side, and which of their latents point the same way."""

from typing import Any

import numpy as np

from everyscope.browse.links import Links
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.svg.charts import Curve, curves, histogram
from everyscope.browse.views.sae import numbers, position_curves

SHOWN = 40
"""Matched latents listed [latents]."""
THRESHOLDS = (0.9, 0.7, 0.5)
"""Cosines above which the share of matched latents is shown."""


def compare_view(index: Index, links: Links, one: SaeFacts | None, other: SaeFacts | None) -> dict[str, Any]:
    """The choice of two SAEs, and where both are chosen, everything about them."""
    found: dict[str, Any] = {"saes": index.saes, "one": one, "other": other, "is_chosen": one is not None and other is not None}
    if one is None or other is None:
        return {**found, "known": known_pairs(index, links)}
    ours, theirs = index.metrics(one), index.metrics(other)
    return {
        **found,
        "numbers": _numbers(ours, theirs),
        "positions": _positions(ours, theirs),
        "matches": _matches(index, links, one, other),
        "split": _split(index, links, one, other),
        "swap": links.compare(other.folder, one.folder),
    }


def known_pairs(index: Index, links: Links, most: int = 24) -> list[dict[str, Any]]:
    """Pairs of SAEs whose latents were matched, as links."""
    pairs = [(index.saes[one], index.saes[other]) for one, other in index.matched_pairs() if one < other < len(index.saes)]
    return [{"one": one, "other": other, "href": links.compare(one.folder, other.folder)} for one, other in pairs[:most]]


def _numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Each number of both; `is_tie` where both intervals are known and overlap."""
    second = {row["name"]: row for row in numbers(theirs)}
    rows = []
    for row in numbers(ours):
        other = second.get(row["name"])
        if other is None:
            continue
        intervals = row["interval"], other["interval"]
        is_known = all(intervals)
        is_tie = is_known and intervals[0][0] <= intervals[1][1] and intervals[1][0] <= intervals[0][1]
        rows.append({**row, "other": other, "difference": other["value"] - row["value"], "is_tie": is_tie})
    return rows


def _positions(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any]]:
    second = dict(position_curves(theirs))
    figures = []
    for unit, points in position_curves(ours):
        if unit in second:
            lines = [Curve("A, token", points), Curve("B, token", second[unit])]
            figures.append((unit, curves(lines, "token of the block", unit, f"{unit} of A and B by position", x_log=True)))
    return figures


def _matches(index: Index, links: Links, one: SaeFacts, other: SaeFacts) -> dict[str, Any] | None:
    """Each latent of the first with its nearest in the second; None where no one has compared them."""
    found = index.matches(one, other)
    if found is None:
        return None
    latents, others, cosines = found
    shares = [(threshold, float((cosines > threshold).mean()) if len(cosines) else 0.0) for threshold in THRESHOLDS]
    counts, edges = np.histogram(cosines, bins=25, range=(min(0.0, float(cosines.min(initial=0.0))), 1.0))
    rows = list(zip(latents[:SHOWN].tolist(), others[:SHOWN].tolist(), cosines[:SHOWN].tolist(), strict=True))
    return {
        "count": len(latents),
        "shares": shares,
        "svg": histogram(edges.tolist(), counts.tolist(), "cosine", "latents of A", "Cosine of each latent’s nearest"),
        "rows": _pairs(index, links, one, other, rows),
    }


def _pairs(
    index: Index, links: Links, one: SaeFacts, other: SaeFacts, rows: list[tuple[int, int, float]]
) -> list[dict[str, Any]]:
    rows = [row for row in rows if 0 <= row[0] < one.width and 0 <= row[1] < other.width]
    captions = index.captions([*((one, row[0]) for row in rows), *((other, row[1]) for row in rows)])
    unknown: dict[str, Any] = {"label": None, "top": []}
    return [
        {
            "cosine": cosine,
            "first": {
                "latent": latent,
                "href": links.latent(one.folder, latent),
                **captions.get((one.number, latent), unknown),
            },
            "second": {
                "latent": match,
                "href": links.latent(other.folder, match),
                **captions.get((other.number, match), unknown),
            },
        }
        for latent, match, cosine in rows
    ]


def _split(index: Index, links: Links, one: SaeFacts, other: SaeFacts) -> dict[str, Any] | None:
    """What feature splitting was measured between the two, in either order; None where none was."""
    narrow, wide = sorted((one, other), key=lambda sae: (sae.width, sae.number))
    found = index.split(narrow, wide)
    if found is None:
        return None
    summary, rows = found
    null = summary.get("null") or {}
    known = [row for row in rows if None not in (row.get("narrow"), row.get("wide"), row.get("cosine"))]
    pairs = _pairs(index, links, narrow, wide, [(row["narrow"], row["wide"], row["cosine"]) for row in known[:SHOWN]])
    extra = {(row["narrow"], row["wide"]): row for row in known}
    return {
        "narrow": narrow,
        "wide": wide,
        "shares": [
            (name, summary.get(name), null.get(name)) for name in ("matched", "split", "new") if summary.get(name) is not None
        ],
        "threshold": summary.get("threshold"),
        "rows": [{**pair, "found": extra[pair["first"]["latent"], pair["second"]["latent"]]} for pair in pairs],
    }
