"""What a search shows: where it jumps, latents by their labels and by the tokens on which they fire, an example under each."""

from typing import Any

from markupsafe import Markup

from everyscope.browse.links import Links
from everyscope.browse.queries import Index
from everyscope.browse.search import SearchRequest, by_label, by_number, by_token, facets, tokens_of
from everyscope.browse.views.examples import shaded
from everyscope.browse.views.sae import table_rows

AROUND = (10, 6)
"""Tokens of an example before and after the one that the latent fires on most [tokens]."""


def search_view(index: Index, links: Links, request: SearchRequest) -> dict[str, Any]:
    """Everything that was found, and how much of the suite was looked into."""
    tokens = tokens_of(index, request)
    labelled, has_all = by_label(index, request)
    lists = {
        "number": by_number(index, request),
        "label": labelled,
        "token": by_token(index, request, tokens),
    }
    longer = request.more()
    return {
        "typed": request.typed,
        "request": request,
        "facets": facets(index),
        "tokens": tokens,
        "has_all_words": has_all,
        "lists": {
            name: {"rows": with_examples(index, table_rows(index, found.rows, links)), "total": found.total}
            for name, found in lists.items()
        },
        "more": links.search(longer.query) if longer != request else None,
    }


def with_examples(index: Index, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table, each with a line of its strongest `example`, or None where none is stored."""
    blocks = index.sequences(row["sequence"] for row in rows if row["sequence"] is not None)
    lines: list[tuple[int, list[int]] | None] = []
    for row in rows:
        ids = blocks[row["sequence"]][2].tolist() if row["sequence"] in blocks else []
        start = max(0, (row["position"] or 0) - AROUND[0])
        lines.append((start, ids[start : (row["position"] or 0) + AROUND[1] + 1]) if ids else None)
    pieces = index.pieces(token for line in lines if line for token in line[1])
    found: list[dict[str, Any]] = []
    for row, line in zip(rows, lines, strict=True):
        example: Markup | None = None
        if line:
            top = row["max_activation"] or 1.0
            example = shaded([pieces[token] for token in line[1]], line[0], {row["position"]: top}, top, row["position"])
        found.append({**row, "example": example})
    return found
