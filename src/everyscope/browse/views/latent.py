"""What a latent's page shows: its label, examples, weights and relatives."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from everyscope.browse.latent_rows import COLUMNS, EXPLANATIONS
from everyscope.browse.links import Links
from everyscope.browse.live import State
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.svg.charts import gauge, histogram, profile
from everyscope.browse.views.examples import example_groups
from everyscope.suite.latents import UNLABELLED

SAME, WIDER, NARROWER, EARLIER, LATER = range(5)
"""Relations of neighbours."""
RELATIONS = {
    SAME: "In this SAE",
    EARLIER: "One layer before",
    LATER: "One layer on",
}
"""The relations that are listed; widths make the tree."""
SHOWN = 6
"""Neighbours listed for each relation [latents]."""
DEPTH, BRANCHES = 3, 3
"""Of the tree of widths, each way [widths, latents]."""
UNKNOWN: dict[str, Any] = {"label": None, "quality": None, "top": []}
"""The caption of a latent whose SAE could not be read."""
QUANTILES = (10, 25, 50, 75, 90, 99)
"""The shares of firings that `quantiles` stand for [%]."""


def latent_view(
    index: Index, links: Links, sae: SaeFacts, latent: int, model: State = "absent", tried: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Everything on the page of one latent; None where there is no such latent.

    `model` is how far the language model is, and `tried` a text that was tried on the latent, from tried_view.
    """
    details = index.details(sae, latent)
    if details is None:
        return None
    details = {**dict.fromkeys(COLUMNS), **details}
    explanations = [{**dict.fromkeys(EXPLANATIONS), **row} for row in index.explanations(sae, latent)]
    before, after, shuffled = index.beside(sae, latent)
    neighbours = [item for item in details.get("neighbours") or [] if _is_known(index, item)]
    cofiring = details.get("cofiring") or []
    relatives = _Relatives(index, links)
    relations = [
        {
            "title": title,
            "items": relatives.listed([item for item in neighbours if item["relation"] == relation][:SHOWN]),
        }
        for relation, title in RELATIONS.items()
    ]
    together = relatives.listed([{**item, "sae": sae.number} for item in cofiring if _is_latent(sae, item)])
    groups, num_repeated = example_groups(index, details)
    widths = {"up": relatives.tree(neighbours, NARROWER, DEPTH), "down": relatives.tree(neighbours, WIDER, DEPTH)}
    return {
        "sae": sae,
        "latent": latent,
        "details": details,
        "is_dead": not details.get("firings"),
        "explanations": [_scores(row) for row in explanations],
        "title": explanations[0] if explanations and explanations[0]["kind"] not in UNLABELLED else None,
        "quality": _quality(explanations),
        "num_read": sae.contents.facts.get("num_tokens"),
        "twin": _twin(index, sae, neighbours, relatives) if not details["firings"] else None,
        "groups": groups,
        "num_repeated": num_repeated,
        "model": model,
        "tried": tried,
        "histogram": _histogram(details, tried["firings"] if tried else ()),
        "quantiles": list(zip(QUANTILES, details.get("quantiles") or [], strict=False)),
        "profile": _profile(details),
        "logits": _logits(index, details),
        "tokens": _tokens(index, details),
        "relations": relations,
        "cofiring": together,
        "has_relatives": bool(together) or any(relation["items"] for relation in relations),
        "widths": widths,
        "tree_up_or_down": bool(widths["up"] or widths["down"]),
        "walk": {
            "previous": None if before is None else links.latent(sae.folder, before),
            "next": None if after is None else links.latent(sae.folder, after),
            "random": None if shuffled is None else links.latent(sae.folder, shuffled),
        },
    }


def latent_json(index: Index, sae: SaeFacts, latent: int) -> dict[str, Any] | None:
    """The same as plain JSON: the row as published, with the text of its tokens; None where there is no such latent."""
    details = index.details(sae, latent)
    if details is None:
        return None
    tokens = set(_token_ids(details))
    return {
        "suite": index.suite["title"],
        "model": index.suite["model"],
        "sae": sae.folder,
        "latent": latent,
        "explanations": index.explanations(sae, latent),
        "saes": {
            item["sae"]: index.saes[item["sae"]].folder for item in details.get("neighbours") or [] if _is_known(index, item)
        },
        "tokens_text": {token: piece.raw.decode("utf-8", "replace") for token, piece in sorted(index.pieces(tokens).items())},
        "row": details,
    }


def _token_ids(details: dict[str, Any]) -> list[int]:
    lists = ("top_logits", "bottom_logits", "raw_top_logits", "raw_bottom_logits", "tokens")
    return [item["token"] for name in lists for item in details.get(name) or []]


def _is_known(index: Index, item: dict[str, Any]) -> bool:
    """Whether a neighbour leads to a latent that exists: a suite may come from anywhere."""
    number = item.get("sae")
    return isinstance(number, int) and 0 <= number < len(index.saes) and _is_latent(index.saes[number], item)


def _is_latent(sae: SaeFacts, item: dict[str, Any]) -> bool:
    latent = item.get("latent")
    return isinstance(latent, int) and 0 <= latent < sae.width


def _quality(explanations: list[dict[str, Any]]) -> dict[str, Any]:
    """What the dot beside the title says: the best label and its quality."""
    best = explanations[0] if explanations else {"label": None, "kind": None, "detection": None, "detection_null": None}
    detection, null = best["detection"], best["detection_null"]
    if best["kind"] in UNLABELLED or detection is None or null is None:
        return {"label": None if best["kind"] in UNLABELLED else best["label"], "quality": None}
    return {"label": best["label"], "quality": detection - null}


def _twin(index: Index, sae: SaeFacts, neighbours: list[dict[str, Any]], relatives: "_Relatives") -> dict[str, Any] | None:
    """The living latent of the same SAE whose decoder row is nearest; None where none of the nearest is alive."""
    near = [item for item in neighbours if item["relation"] == SAME]
    living = index.living(sae, [item["latent"] for item in near])
    return next(iter(relatives.listed([item for item in near if item["latent"] in living][:1])), None)


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    scores = []
    for name, title in (("detection", "Detection"), ("fuzzing", "Fuzzing")):
        value = row.get(name)
        if value is not None:
            low, high, null = (row.get(f"{name}_{end}") for end in ("low", "high", "null"))
            interval = (low, high) if low is not None and high is not None else None
            words = f"{title} {value:.2f}" + (f", shuffled labels {null:.2f}" if null is not None else "")
            scores.append(
                {"title": title, "value": value, "interval": interval, "null": null, "svg": gauge(value, interval, null, words)}
            )
    return {**row, "scores": scores}


def _histogram(details: dict[str, Any], marks: Sequence[float]) -> Markup | None:
    counts, top = details.get("histogram") or [], details.get("max_activation")
    if not counts or not top:
        return None
    edges = [top * place / len(counts) for place in range(len(counts) + 1)]
    return histogram(edges, counts, "activation", "tokens", "How strongly it fires", is_tall_log=True, marks=marks)


def _profile(details: dict[str, Any]) -> Markup | None:
    values = details.get("position_profile") or []
    if not any(values):
        return None
    tips = [f"stretch {place + 1} of {len(values)}: fires on {value or 0:.2%}" for place, value in enumerate(values)]
    return profile(values, "How often it fires along the sequence, from its start to its end", tips)


def _logits(index: Index, details: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that the latent makes likelier and less likely, along the path and raw; nothing where no one has computed it."""
    found = []
    for title, prefix, note in (
        ("Through the norms", "", "The decoder row times the norm gains on its way, then the unembedding."),
        ("Raw", "raw_", "The decoder row times the unembedding, no gains."),
    ):
        top, bottom = details.get(f"{prefix}top_logits") or [], details.get(f"{prefix}bottom_logits") or []
        if top or bottom:
            pieces = index.pieces(item["token"] for item in [*top, *bottom])
            highest = max((abs(item["value"] or 0) for item in [*top, *bottom]), default=1.0)
            found.append(
                {
                    "title": title,
                    "note": note,
                    "name": prefix or "gained",
                    "top": _bars(top, pieces, "value", highest),
                    "bottom": _bars(bottom, pieces, "value", highest),
                }
            )
    return found


def _bars(items: Sequence[dict[str, Any]], pieces: dict[int, Piece], value: str, highest: float) -> list[dict[str, Any]]:
    """Tokens with a value and, for its bar, that value in tenths of the highest."""
    return [
        {
            **item,
            "piece": pieces[item["token"]],
            "value": item[value],
            "tenths": round(10 * min(1.0, abs(item[value] or 0) / (highest or 1.0))),
        }
        for item in items
    ]


def _tokens(index: Index, details: dict[str, Any]) -> list[dict[str, Any]]:
    items = details.get("tokens") or []
    return _bars(items, index.pieces(item["token"] for item in items), "share", 1.0)


class _Relatives:
    """Latents beside this one, as rows with links, labels and cosines."""

    def __init__(self, index: Index, links: Links) -> None:
        self._index, self._links = index, links

    def listed(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As a list, in the order given."""
        places = [(self._index.saes[item["sae"]], item["latent"]) for item in items]
        captions = self._index.captions(places)
        return [self._row(item, captions.get((item["sae"], item["latent"]), UNKNOWN)) for item in items]

    def _row(self, item: dict[str, Any], caption: dict[str, Any]) -> dict[str, Any]:
        sae = self._index.saes[item["sae"]]
        value = item.get("cosine", item.get("phi")) or 0.0
        return {
            **item,
            **caption,
            "facts": sae,
            "href": self._links.latent(sae.folder, item["latent"]),
            "value": value,
            "tenths": round(10 * min(1.0, abs(value))),
        }

    def tree(self, neighbours: list[dict[str, Any]], relation: int, depth: int) -> list[dict[str, Any]]:
        """The nearest latents of the next width, each with its own, down to `depth` widths."""
        near = [item for item in neighbours if item["relation"] == relation][:BRANCHES]
        rows = self.listed(near)
        for row in rows:
            deeper: list[dict[str, Any]] = []
            if depth > 1 and row["facts"].is_indexed:
                details = self._index.details(row["facts"], row["latent"], ["neighbours"]) or {}
                deeper = [item for item in details.get("neighbours") or [] if _is_known(self._index, item)]
            row["branches"] = self.tree(deeper, relation, depth - 1) if deeper else []
        return rows
