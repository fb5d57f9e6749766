"""A page of an SAE's table of latents: sorted, narrowed, by words of their labels, by a token on which they fire."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from everyscope.browse.parts import TEXT
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts, packed
from everyscope.browse.tables import SORTABLE
from everyscope.suite.latents import UNLABELLED

PAGE = 50
"""Latents on a page of a table [latents]."""
MAX_TOKENS = 64
"""Tokens of the vocabulary that one search by token takes in [tokens]."""
DENSE = 0.1
"""Frequency from which a latent is called dense [1]."""
Shown = Literal["alive", "all", "dense", "dead", "labelled"]
SHOWN: dict[Shown, str] = {
    "alive": "firings > 0",
    "all": "1",
    "dense": f"frequency > {DENSE}",
    "dead": "firings = 0",
    "labelled": f"label IS NOT NULL AND ifnull(kind, '') NOT IN ({', '.join(map(repr, UNLABELLED))})",
}
"""What a table can be narrowed to, as SQL."""
FIELDS = (
    "latent",
    "firings",
    "frequency",
    "mean_activation",
    "max_activation",
    "entropy",
    "predictability",
    "nearest",
    "top_tokens",
    "sequence",
    "position",
    "label",
    "method",
    "kind",
    "detection",
    "fuzzing",
    "quality",
)
"""Columns of an index that rows of tables have; `sae` is beside them."""


@dataclass(frozen=True)
class TableRequest:
    """Which page of an SAE's latents, in which order; everything is checked here, for it comes from an address."""

    sort: str = ""
    """One of SORTABLE; empty takes what puts latents first that a reader can name."""
    is_descending: bool = True
    """Whether the largest come first."""
    shown: Shown = "alive"
    """What the table is narrowed to."""
    label: str = ""
    """Words that the label must have; empty takes any."""
    token: str = ""
    """A token on which latents must fire; empty takes any."""
    page: int = 1
    """Page, from 1."""

    @staticmethod
    def read(query: dict[str, str]) -> "TableRequest":
        """From an address; what makes no sense falls back to the default."""
        page = query.get("page", "")
        shown = query.get("show", "")
        return TableRequest(
            sort=query.get("sort", "") if query.get("sort") in SORTABLE else "",
            is_descending=query.get("order") != "up",
            shown=shown if shown in SHOWN else "alive",  # pyright: ignore[reportArgumentType]
            label=query.get("label", "")[:200],
            token=query.get("token", "")[:200],
            page=min(int(page), 10**6) if re.fullmatch(r"[1-9]\d{0,6}", page, re.ASCII) else 1,
        )

    @property
    def query(self) -> dict[str, str]:
        """The address that says the same: only what differs from the default."""
        plain = TableRequest()
        found = {"sort": self.sort, "show": self.shown, "label": self.label, "token": self.token, "page": str(self.page)}
        kept = {"sort": plain.sort, "show": plain.shown, "label": "", "token": "", "page": "1"}
        query = {name: value for name, value in found.items() if value != kept[name]}
        return query if self.is_descending else {**query, "order": "up"}


@dataclass(frozen=True)
class TablePage:
    """The latents found."""

    rows: list[dict[str, Any]]
    """Those of this page, as columns of the index by name."""
    total: int
    """How many there are on all pages [latents]."""
    tokens: list[Piece]
    """The tokens of the vocabulary that a search by token took in."""


def sorted_by(sae: SaeFacts, request: TableRequest) -> str:
    """The column to sort by: as asked for, else how well label or token predict where a latent fires, or its frequency."""
    return request.sort or ("detection" if sae.num_labels else "predictability" if sae.is_described else "frequency")


def words_query(words: str) -> str:
    """What a person typed, as a question to FTS5: every word, the last as a beginning; empty where there is no word."""
    found = re.findall(r"\w+", words)
    return " ".join(f'"{word}"' for word in found) + ("*" if found else "")


def latent_page(index: Index, sae: SaeFacts, request: TableRequest) -> TablePage:
    """One page of an SAE's latents."""
    conditions = [SHOWN[request.shown]]
    values: list[Any] = []
    if words := words_query(request.label):
        conditions.append("latent IN (SELECT rowid FROM labels WHERE labels MATCH ?)")
        values.append(words)
    elif request.label:
        conditions.append("0")
    tokens: list[Piece] = []
    if request.token:
        tokens = find_tokens(index, request.token)
        conditions.append("latent IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(sorted(shares_on(index, sae, tokens))))
    where = " AND ".join(conditions)
    if conditions == [SHOWN["alive"]]:
        index.require(sae)
        total = sae.num_alive
    else:
        ((total,),) = index.rows(sae.number, f"SELECT count(*) FROM latents WHERE {where}", values)
    # Descending, SQLite has NULL last and an index gives the order; ascending it must be asked for.
    sort = sorted_by(sae, request)
    order = f"{sort} DESC" if request.is_descending else f"{sort} IS NULL, {sort}"
    limits = [PAGE, PAGE * (request.page - 1)]
    return TablePage(
        latent_rows(index, sae, f"WHERE {where} ORDER BY {order}, latent LIMIT ? OFFSET ?", [*values, *limits]), total, tokens
    )


def latent_rows(index: Index, sae: SaeFacts, clauses: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of an SAE's table by name: FIELDS and `sae`, its number."""
    found = index.rows(sae.number, f"SELECT {', '.join(FIELDS)} FROM latents {clauses}", values)
    return [{**dict(zip(FIELDS, row, strict=True)), "sae": sae.number} for row in found]


def find_tokens(index: Index, typed: str) -> list[Piece]:
    """Tokens of the vocabulary that are what was typed, then those that are it but for spaces and case, then by its id."""
    if typed.startswith("#") and typed[1:].isdecimal() and len(typed) < 10:
        return list(index.pieces([int(typed[1:])]).values())
    exact = index.rows(TEXT, "SELECT token FROM vocabulary WHERE text = ? LIMIT ?", (typed, MAX_TOKENS))
    alike = index.rows(TEXT, "SELECT token FROM vocabulary WHERE key = ? LIMIT ?", (typed.strip().lower(), MAX_TOKENS))
    ids = list(dict.fromkeys(token for (token,) in [*exact, *alike]))[:MAX_TOKENS]
    pieces = index.pieces(ids)
    return [pieces[token] for token in ids]


def shares_on(index: Index, sae: SaeFacts, tokens: list[Piece]) -> dict[int, float]:
    """The latents of an SAE that fire most on one of these tokens, each with the largest share of one's occurrences [1]."""
    best: dict[int, float] = {}
    for piece in tokens:
        for latents, shares in index.rows(sae.number, "SELECT latents, shares FROM postings WHERE token = ?", (piece.token,)):
            for latent, share in zip(packed(latents, np.int32).tolist(), packed(shares, np.float32).tolist(), strict=True):
                best[latent] = max(share, best.get(latent, 0.0))
    return best
