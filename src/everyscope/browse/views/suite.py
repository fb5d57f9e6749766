"""What the first page shows: headlines, heat maps, Pareto plots and the table of SAEs; and the suite's comparisons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

from markupsafe import Markup

from everyscope.browse.links import Links
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.svg.elements import element
from everyscope.browse.svg.maps import HeatmapCell, Point, heat_map, layer_step, mark, pareto, pareto_ends
from everyscope.sites.names import SITE_KINDS, SITE_TITLES, SiteKind
from everyscope.suite.layout import width_label


@dataclass(frozen=True)
class HeadlineMeasure:
    """A headline number that figures show."""

    name: str
    title: str
    unit: str
    note: str


MEASURES = (
    HeadlineMeasure("fvu_usual", "FVU", "FVU [1]", "Fraction of variance unexplained: lower is better."),
    HeadlineMeasure(
        "delta_loss", "Delta loss", "Delta loss [nats/token]", "Rise of the model’s loss with the reconstruction in place."
    ),
    HeadlineMeasure(
        "loss_recovered", "Loss recovered", "Loss recovered [1]", "1 where splicing costs nothing, 0 where as much as the mean."
    ),
    HeadlineMeasure("dead_fraction", "Dead", "Dead latents [1]", "Share of latents that never fire."),
)
FRONTS = MEASURES[:2]
"""The measures that Pareto plots draw against L0."""


def suite_view(index: Index, links: Links) -> dict[str, Any]:
    """Everything on the first page."""
    layers = sorted({sae.site.layer for sae in index.saes})
    widths = sorted({sae.width for sae in index.saes})
    return {
        "headlines": headlines(index),
        "heats": [_heats(index, links, measure, layers, widths) for measure in MEASURES if _has(index, measure)],
        "fronts": [_fronts(index, links, measure, layers, widths) for measure in FRONTS if _has(index, measure)],
        "layers": [(layer, layer_step(layer, layers)) for layer in layers],
        "marks": [(width_label(width), _legend_mark(place)) for place, width in enumerate(widths)],
        "has_massive": any(sae.headline["num_massive_tokens"] for sae in index.saes),
        "has_canonical": any(sae.is_canonical for sae in index.saes),
        "groups": _groups(index, links),
        "problems": [sae for sae in index.saes if sae.problem],
    }


def headlines(index: Index) -> list[tuple[str, str]]:
    """The few numbers at the top: value, and what it is."""
    chosen = list(representatives(index).values())
    alive = sum(sae.num_alive for sae in index.saes)
    total = sum(sae.width for sae in index.saes)
    labelled = sum(sae.num_labels for sae in index.saes)
    found = [
        (str(len(index.saes)), f"SAEs at {len({sae.site for sae in index.saes})} sites"),
        (f"{total:,}", "latents"),
        *([(nearly(alive, total), "of them fire on the text read")] if index.is_whole else []),
        (f"{median(sae.headline['fvu_usual'] for sae in chosen):.3f}", "median FVU, middle sparsity"),
        (f"{median(sae.headline['delta_loss'] for sae in chosen):.3f}", "median delta loss there [nats/token]"),
    ]
    share = f"latents with a label ({labelled / max(1, total):.0%})"
    return [*found, (f"{labelled:,}", share)] if labelled and index.is_whole else found


def nearly(count: int, total: int) -> str:
    """A share in per cent, with as many decimals as it takes not to round it to all where a few are missing."""
    share = count / max(1, total)
    texts = (f"{share:.{decimals}%}" for decimals in (1, 2, 3, 4, 6))
    return next(text for text in texts if count == total or not text.startswith("100"))


def representatives(index: Index) -> dict[tuple[str, int, int], SaeFacts]:
    """At each kind of site, layer and width the canonical SAE, or where none is named that of middle L0."""
    groups: dict[tuple[str, int, int], list[SaeFacts]] = {}
    for sae in index.saes:
        groups.setdefault((sae.site.kind, sae.site.layer, sae.width), []).append(sae)
    chosen = {}
    for key, group in groups.items():
        middle = median_low(sorted(sae.headline["l0"] for sae in group))
        named = [sae for sae in group if sae.is_canonical]
        chosen[key] = (named or [sae for sae in group if sae.headline["l0"] == middle])[0]
    return chosen


def _has(index: Index, measure: HeadlineMeasure) -> bool:
    return any(sae.headline.get(measure.name) is not None for sae in index.saes)


def tip(sae: SaeFacts) -> str:
    """An SAE and its headline numbers, in a line."""
    numbers = sae.headline
    plain = f" (with massive tokens {numbers['fvu']:.3f})" if numbers["num_massive_tokens"] else ""
    return f"{sae.title}: FVU {numbers['fvu_usual']:.3f}{plain}, delta loss {numbers['delta_loss']:.3f} nats/token"


def _heats(index: Index, links: Links, measure: HeadlineMeasure, layers: list[int], widths: list[int]) -> dict[str, Any]:
    kinds: list[SiteKind] = [kind for kind in SITE_KINDS if any(sae.site.kind == kind for sae in index.saes)]
    chosen = representatives(index)
    values = {key: sae.headline.get(measure.name) for key, sae in chosen.items()}
    known = [value for value in values.values() if value is not None]
    panels = []
    for width in widths:
        cells = []
        for (kind, layer, at_width), sae in chosen.items():
            value = values[kind, layer, at_width]
            if at_width == width and value is not None:
                where = (layers.index(layer), kinds.index(sae.site.kind))
                cells.append(HeatmapCell(*where, value, links.sae(sae.folder), tip(sae)))
        label = f"{measure.title} by layer and site, width {width_label(width)}"
        names = [f"layer {layer}" for layer in layers]
        panels.append((width_label(width), heat_map(names, kinds, cells, (min(known), max(known)), label)))
    return {"measure": measure, "panels": panels}


def _fronts(index: Index, links: Links, measure: HeadlineMeasure, layers: list[int], widths: list[int]) -> dict[str, Any]:
    points: dict[SiteKind, list[Point]] = {}
    for sae in index.saes:
        value = sae.headline.get(measure.name)
        if value is not None:
            points.setdefault(sae.site.kind, []).append(_point(sae, value, links, measure, layers, widths))
    baselines = [
        sae.headline["fvu_pca_usual"]
        for sae in index.saes
        if measure.name == "fvu_usual" and sae.headline.get("fvu_pca_usual") is not None
    ]
    ends = pareto_ends([point for group in points.values() for point in group], baselines)
    panels = []
    for kind in sorted(points, key=SITE_KINDS.index):
        label = f"{measure.title} against L0, {SITE_TITLES[kind]}"
        baseline = _pca(index, kind, layers) if measure.name == "fvu_usual" else []
        inside = [line for line in baseline if line]
        svg = pareto(points[kind], inside, ends, measure.unit, label, f"clip-{measure.name}-{kind}")
        panels.append((SITE_TITLES[kind], svg))
    return {"measure": measure, "panels": panels}


def _point(sae: SaeFacts, value: float, links: Links, measure: HeadlineMeasure, layers: list[int], widths: list[int]) -> Point:
    interval = (sae.headline.get("intervals") or {}).get(measure.name)
    return Point(
        l0=max(sae.headline["l0"], 0.1),
        value=value,
        interval=tuple(interval) if interval else None,
        layer_step=layer_step(sae.site.layer, layers),
        mark=widths.index(sae.width),
        line=(sae.site.layer, sae.width),
        is_canonical=sae.is_canonical,
        href=links.sae(sae.folder),
        tip=tip(sae),
    )


def _pca(index: Index, kind: SiteKind, layers: list[int]) -> list[list[tuple[float, float]]]:
    """The PCA baseline's line at each layer."""
    return [
        sorted(
            (max(sae.headline["l0"], 0.1), sae.headline["fvu_pca_usual"])
            for sae in index.saes
            if sae.site.kind == kind and sae.site.layer == layer and sae.headline.get("fvu_pca_usual") is not None
        )
        for layer in layers
    ]


def _legend_mark(place: int) -> Markup:
    return element("svg", mark(place), viewBox="-8 -8 16 16", class_="mark", aria_hidden="true")


def _groups(index: Index, links: Links) -> list[dict[str, Any]]:
    """The SAEs by kind of site, as rows of a table."""
    highest = {name: max(sae.headline[name] for sae in index.saes) for name in ("fvu_usual", "delta_loss")}

    def row(sae: SaeFacts) -> dict[str, Any]:
        where = "" if sae.site.kind == "embed" else f"layer {sae.site.layer}, "
        shares = {name: sae.headline[name] / (highest[name] or 1.0) for name in highest}
        return {
            "sae": sae,
            "href": links.sae(sae.folder),
            "title": f"{where}width {width_label(sae.width)}",
            "intervals": sae.headline.get("intervals") or {},
            "fvu_tenths": round(10 * min(1.0, max(0.0, shares["fvu_usual"]))),
            "delta_tenths": round(10 * min(1.0, max(0.0, shares["delta_loss"]))),
        }

    kinds: list[SiteKind] = [kind for kind in SITE_KINDS if any(sae.site.kind == kind for sae in index.saes)]
    return [
        {"kind": kind, "title": SITE_TITLES[kind], "rows": [row(sae) for sae in index.saes if sae.site.kind == kind]}
        for kind in kinds
    ]


def sae_numbers(index: Index) -> Mapping[str, SaeFacts]:
    """The SAEs by each of the names that comparisons may call them: folder in the suite, or place in the run."""
    named = {f"{sae.site.folder}/{sae.record['name']}": sae for sae in index.saes}
    return {**named, **{sae.folder: sae for sae in index.saes}}


TITLES: dict[str, tuple[str, str]] = {
    "widths": ("Widths at matched L0", "What more latents buy when as many of them are active."),
    "splitting": (
        "Feature splitting",
        "Shares of a wider SAE’s latents that match a narrower one’s, split it, or are new, against chance.",
    ),
    "transfer": ("Transfer to the tuned model", "SAEs trained on the base model, measured on its tuned sibling."),
    "subsets": ("Kinds of text", "The same SAEs on parts of the text and on other text."),
    "precision": ("Precision", "What fewer bits for SAE and model cost."),
    "probing": ("Probing", "How well a few latents tell classes of tokens apart, beside neurons and a dense probe."),
    "random_model": ("Random model", "The same training on a model with random weights: what reconstruction alone gives."),
}


def comparisons_view(index: Index, links: Links) -> dict[str, Any]:
    """Everything measured over the whole suite, each as a table."""
    numbers = sae_numbers(index)
    found = []
    for name in [*TITLES, *sorted(set(index.slices) - set(TITLES))]:
        if isinstance(index.slices.get(name), dict):
            title, note = TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
            table = JsonTable.of(index.slices[name], lambda text: _sae_cell(text, numbers, links))
            found.append({"name": name, "title": title, "note": index.slices[name].get("note") or note, "table": table})
    return {"comparisons": [item for item in found if item["table"].rows]}


def _sae_cell(text: str, numbers: Mapping[str, SaeFacts], links: Links) -> dict[str, Any] | None:
    sae = numbers.get(text)
    return sae and {"text": sae.title, "href": links.sae(sae.folder)}


@dataclass(frozen=True)
class JsonTable:
    """Rows of one JSON, flattened: its scalars as columns, the lists of records inside as more rows."""

    columns: list[str]
    rows: list[list[dict[str, Any]]]

    @staticmethod
    def of(value: dict[str, Any], link: Callable[[str], dict[str, Any] | None]) -> "JsonTable":
        """The table in `value`; `link` turns the name of an SAE into a cell that leads there, and anything else into None."""
        flat = [record for inner in value.values() for record in _records(inner)]
        columns = list(dict.fromkeys(name for record in flat for name in record if name not in HIDDEN))
        rows = [[_cell(record.get(name), link) for name in columns] for record in flat]
        return JsonTable([name.replace("_", " ") for name in columns], rows)


HIDDEN = {"table", "description", "threshold"}
"""Fields of comparisons that a table does not show."""


def _records(value: Any) -> list[dict[str, Any]]:
    """The records in a list; a record that holds a list of records becomes one row for each of them."""
    if not isinstance(value, list):
        return []
    found = []
    for item in value:
        if not isinstance(item, dict):
            continue
        outer = _scalars(item)
        inner = [record for field in item.values() for record in _records(field)]
        found += [{**outer, **record} for record in inner] or [outer]
    return found


def _scalars(item: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in item.items():
        if isinstance(value, dict) and name != "intervals":
            found |= {f"{name} {inner}": number for inner, number in value.items() if not isinstance(number, dict | list)}
        elif _is_interval(value) or not isinstance(value, dict | list):
            found[name] = value
    return found


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value)


def _cell(value: Any, link: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    if isinstance(value, str):
        return {"is_text": True, **(link(value) or {"text": value, "href": None})}
    if isinstance(value, list):
        return {"text": f"{value[0]:.3g} to {value[1]:.3g}", "href": None, "is_text": False}
    text = "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return {"text": text, "href": None, "is_text": False}
