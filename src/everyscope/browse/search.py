"""Searching the whole suite: words of labels, tokens on which latents fire, numbers of latents, and addresses, which jump.

SAEs whose tables are not indexed yet are left out and counted: a search says what it has not seen.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.table_page import SHOWN, find_tokens, latent_rows, shares_on, words_query
from everyscope.suite.layout import width_label
from everyscope.suite.records import FOLDER

FOUND = 60
"""Latents that a list of a search shows at first, and how many more each time [latents]."""
MAX_FOUND = 6000
"""Latents that it shows at most [latents]."""
QUALITIES = {"": None, "weak": 0.1, "strong": 0.25}
"""Labels that are at least so good: detection minus that of other latents' labels [1]."""
SHORT_ADDRESS = re.compile(r"(\w+)[/ ,]+(\d+)[/ ,]+(\w+)[/ ,]+(\d+)(?:[/ ,#]+(\d{1,12}))?", re.ASCII)
"""An address in short: site, layer, width, L0 and perhaps a latent."""


@dataclass(frozen=True)
class SearchRequest:
    """What is looked for, and where; everything is checked here, for it comes from an address."""

    typed: str = ""
    """Words, a token, a number or an address."""
    site: str = ""
    """A kind of site; empty takes all."""
    layer: int | None = None
    """A layer; None takes all."""
    width: int | None = None
    """Latents of the SAEs; None takes all."""
    quality: str = ""
    """One of QUALITIES."""
    most: int = FOUND
    """Latents that each list shows at most [latents]."""

    @staticmethod
    def read(query: Mapping[str, str]) -> "SearchRequest":
        """From an address; what makes no sense falls back to the default."""
        numbers = {name: _number(query.get(name, "")) for name in ("layer", "width", "most")}
        return SearchRequest(
            typed=query.get("q", "")[:400],
            site=query.get("site", "")[:40],
            layer=numbers["layer"],
            width=numbers["width"],
            quality=query.get("quality", "") if query.get("quality") in QUALITIES else "",
            most=min(MAX_FOUND, max(FOUND, numbers["most"] or FOUND)),
        )

    @property
    def query(self) -> dict[str, str]:
        """The address that says the same: only what differs from the default."""
        found = {"q": self.typed, "site": self.site, "quality": self.quality}
        numbers = {"layer": self.layer, "width": self.width, "most": self.most if self.most != FOUND else None}
        return {**found, **{name: str(value) for name, value in numbers.items() if value is not None}}

    def more(self) -> "SearchRequest":
        """The same with longer lists."""
        return replace(self, most=min(MAX_FOUND, self.most + FOUND * 4))

    def takes(self, sae: SaeFacts) -> bool:
        """Whether an SAE is looked into."""
        own = {"site": sae.site.kind, "layer": sae.site.layer, "width": sae.width}
        return all(getattr(self, name) in ("", None, value) for name, value in own.items())


@dataclass(frozen=True)
class Found:
    """A list of latents."""

    rows: list[dict[str, Any]]
    """Those that are shown, as rows of tables."""
    total: int
    """How many there are [latents]."""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def _looked_into(index: Index, request: SearchRequest) -> Iterator[SaeFacts]:
    return (sae for sae in index.saes if sae.is_indexed and request.takes(sae))


def _least_quality(request: SearchRequest) -> str:
    least = QUALITIES[request.quality]
    return "" if least is None else f" AND quality >= {least}"


def by_label(index: Index, request: SearchRequest) -> tuple[Found, bool]:
    """The latents whose labels have these words, those first whose labels are best; and whether they have all of the words.

    Words are stems, and the last one is a beginning. Where no label has all of them, those that have some.
    """
    query = words_query(request.typed)
    if not query:
        return Found([], 0), True
    found = _labelled(index, request, query)
    if found.total or " " not in query:
        return found, True
    return _labelled(index, request, query.replace(" ", " OR ")), False


def _labelled(index: Index, request: SearchRequest, query: str) -> Found:
    rows: list[dict[str, Any]] = []
    total = 0
    where = f"WHERE latent IN (SELECT rowid FROM labels WHERE labels MATCH ?) AND {SHOWN['labelled']}{_least_quality(request)}"
    for sae in _looked_into(index, request):
        ((count,),) = index.rows(sae.number, f"SELECT count(*) FROM latents {where}", [query])
        total += count
        if count:
            rows += latent_rows(index, sae, f"{where} ORDER BY quality DESC, latent LIMIT ?", [query, request.most])
    rows.sort(key=lambda row: (row["quality"] is None, -(row["quality"] or 0.0), row["sae"], row["latent"]))
    return Found(rows[: request.most], total)


def by_token(index: Index, request: SearchRequest, tokens: list[Piece]) -> Found:
    """The latents that fire on the largest share of these tokens' occurrences, with that `share`."""
    shares: dict[tuple[int, int], float] = {}
    for sae in _looked_into(index, request) if tokens else ():
        here = shares_on(index, sae, tokens)
        if here and _least_quality(request):
            question = f"SELECT latent FROM latents WHERE latent IN (SELECT value FROM json_each(?)){_least_quality(request)}"
            here = {latent: here[latent] for (latent,) in index.rows(sae.number, question, [json.dumps(sorted(here))])}
        shares |= {(sae.number, latent): share for latent, share in here.items()}
    chosen = sorted(shares, key=lambda place: (-shares[place], place))[: request.most]
    return Found([{**row, "share": shares[row["sae"], row["latent"]]} for row in _rows(index, chosen)], len(shares))


def by_number(index: Index, request: SearchRequest) -> Found:
    """The latents of that number, one an SAE."""
    number = _number(request.typed.strip().lstrip("#"))
    if number is None:
        return Found([], 0)
    places = [(sae.number, number) for sae in _looked_into(index, request) if number < sae.width]
    return Found(_rows(index, places[: request.most]), len(places))


def _rows(index: Index, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The rows of these latents, given by SAE and number, in their order."""
    wanted: dict[int, list[int]] = {}
    for number, latent in places:
        wanted.setdefault(number, []).append(latent)
    found = {}
    for number, latents in wanted.items():
        clause = "WHERE latent IN (SELECT value FROM json_each(?))"
        found |= {(number, row["latent"]): row for row in latent_rows(index, index.saes[number], clause, [json.dumps(latents)])}
    return [found[place] for place in places if place in found]


def jump(index: Index, typed: str) -> tuple[SaeFacts, int | None] | None:
    """Where an address leads: an SAE, and a latent if it names one; None for what is no address of this suite.

    Addresses of our pages, of an export's and of folders are taken, and site/layer/width/L0/latent in short.
    """
    if long := FOLDER.search(typed):
        folder, rest = typed[long.start() :].partition("?")[0].partition(long.group())[1:]
        sae = index.find(folder)
        numbers = re.findall(r"\d{1,12}", re.sub(r"page-\d+", "", rest))
        latent = int(numbers[-1]) if numbers else None
    elif short := SHORT_ADDRESS.fullmatch(typed.strip()):
        sae = next((sae for sae in index.saes if _is_called(sae, *short.groups()[:4])), None)
        latent = int(short.group(5)) if short.group(5) else None
    else:
        return None
    if sae is None or (latent is not None and latent >= sae.width):
        return None
    return sae, latent


def _is_called(sae: SaeFacts, site: str, layer: str, width: str, l0: str) -> bool:
    return (sae.site.kind, str(sae.site.layer), str(round(sae.headline["l0"]))) == (site, layer, l0) and width.lower() in (
        str(sae.width),
        width_label(sae.width),
    )


def facets(index: Index) -> dict[str, list[Any]]:
    """What a search can be narrowed to: kinds of sites, layers and widths that the suite has."""
    return {
        "sites": sorted({sae.site.kind for sae in index.saes}),
        "layers": sorted({sae.site.layer for sae in index.saes}),
        "widths": sorted({sae.width for sae in index.saes}),
    }


def tokens_of(index: Index, request: SearchRequest) -> list[Piece]:
    """The tokens that a search by token takes in."""
    return find_tokens(index, request.typed) if request.typed else []
