"""SAEs of a base model on its tuned sibling, against SAEs that were trained on the sibling itself."""

from functools import partial
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from everyscope.publish.drawing.palette import NEUTRAL, SITE_COLOURS, SITE_MARKERS
from everyscope.publish.drawing.pictures import LegendKey, Panel, Picture
from everyscope.publish.drawing.scales import bars, is_mostly_positive, scale_log
from everyscope.publish.evidence import Evidence, kind_of, layer_of, present
from everyscope.publish.sections.dots import FEW_TICKS, Dot, draw_dots, interval_of
from everyscope.publish.sections.section import Section, plural
from everyscope.sites.names import SITE_TITLES

SEGMENTS = {"all": "All turns", "user": "The user's turn", "model": "The model's turn"}
MEASURES = (("delta_loss", "Delta loss [nats/token]"), ("fvu_usual", "FVU [1]"))
PLACE = ("site", "width", "segment", "target")
"""What rows must share to be compared."""

Row = dict[str, Any]


def transfer_section(evidence: Evidence) -> Section | None:
    """Base SAEs against tuned ones, turn by turn; of base SAEs alone where no others are; none without the slice."""
    slice_ = evidence.slices.get("transfer")
    if not slice_ or not slice_["rows"]:
        return None
    pairs = transfer_pairs(slice_["rows"])
    kinds = present(slice_["rows"])
    pictures = []
    for name, label in MEASURES:
        if pairs:
            panels = [
                Panel(title, partial(_draw_pairs, pairs=_of_segment(pairs, segment, name), name=name, label=label))
                for segment, title in SEGMENTS.items()
                if _of_segment(pairs, segment, name)
            ]
            keys = [LegendKey(SITE_TITLES[kind], SITE_COLOURS[kind], SITE_MARKERS[kind]) for kind in kinds]
            keys.append(LegendKey("equally good", line=(0, (4, 2))))
        else:
            panels, keys = _base_panels(evidence, slice_["rows"], name, label), evidence.layer_keys
        title = f"{label.rpartition(' ')[0]} on {slice_['tuned']} of SAEs trained on {slice_['base']}"
        pictures.append(Picture(f"{name.removesuffix('_usual')}_transferred", title, tuple(panels), tuple(keys)))
    tokens = next((row.get("num_tokens") for row in slice_["rows"] if row["segment"] == "all"), None)
    return Section(
        anchor="transfer",
        title=f"From {slice_['base']} to {slice_['tuned']}",
        basis=evidence.basis_of(tokens, slice_.get("data", "conversations")),
        says=_says(pairs, slice_),
        notes=("Each point is a site and width at one sparsity; above the dashed line the tuned model’s own SAE does better.",)
        if pairs
        else (),
        pictures=tuple(pictures),
    )


def transfer_pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Each base SAE's row with the tuned SAE's of the same site, width, segment and target, of those the one of nearest L0."""
    found = []
    for base in rows:
        same = [row for row in rows if row["sae"] == "tuned" and all(row.get(key) == base.get(key) for key in PLACE)]
        if base["sae"] == "base" and same:
            found.append((base, min(same, key=lambda row: abs(row["l0"] - base["l0"]))))
    return found


def _of_segment(pairs: list[tuple[Row, Row]], segment: str, name: str) -> list[tuple[Row, Row]]:
    return [pair for pair in pairs if pair[0]["segment"] == segment and all(row[name] is not None for row in pair)]


def _draw_pairs(axes: Axes, *, pairs: list[tuple[Row, Row]], name: str, label: str) -> None:
    for base, tuned in pairs:
        kind = kind_of(base)
        axes.errorbar(
            [tuned[name]],
            [base[name]],
            xerr=bars([tuned[name]], [interval_of(tuned, name)]),
            yerr=bars([base[name]], [interval_of(base, name)]),
            color=SITE_COLOURS[kind],
            marker=SITE_MARKERS[kind],
            elinewidth=0.7,
        )
    values = [row[name] for pair in pairs for row in pair]
    if is_mostly_positive(values):
        scale_log(axes.xaxis, values)
        scale_log(axes.yaxis, values)
        ends = axes.get_xlim()
    else:
        margin = 0.06 * (max(values) - min(values) or 1.0)
        ends = (min(values) - margin, max(values) + margin)
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.xaxis.set_major_locator(MaxNLocator(FEW_TICKS))
        axes.yaxis.set_major_locator(MaxNLocator(FEW_TICKS))
    axes.plot(ends, ends, color=NEUTRAL, linestyle=(0, (4, 2)), linewidth=1, zorder=1)
    axes.set_xlabel(f"Tuned model's own SAE {label[label.index('[') :]}")
    axes.set_ylabel(f"Base model's SAE {label[label.index('[') :]}")


def _base_panels(evidence: Evidence, rows: list[Row], name: str, label: str) -> list[Panel]:
    """Base SAEs alone, a row for each turn."""
    known = [row for row in rows if row["sae"] == "base" and row[name] is not None]
    panels = []
    for kind in present(known):
        dots = [
            Dot(SEGMENTS[row["segment"]], row[name], interval_of(row, name), evidence.layers[layer_of(row)])
            for row in known
            if kind_of(row) == kind and layer_of(row) in evidence.layers
        ]
        draw = partial(
            draw_dots,
            dots=dots,
            rows=list(SEGMENTS.values()),
            values=[row[name] for row in known],
            label=label,
            is_logarithmic=True,
        )
        panels.append(Panel(SITE_TITLES[kind], draw))
    return panels


def _says(pairs: list[tuple[Row, Row]], slice_: dict[str, Any]) -> str:
    if not pairs:
        rise = median(row["delta_loss"] for row in slice_["rows"] if row["segment"] == "all" and row["delta_loss"] is not None)
        return f"On {slice_['tuned']}, SAEs trained on {slice_['base']} raise the loss by {rise:.3f} nats/token in the median."
    parts = []
    for segment, words in (("model", "where the model speaks"), ("user", "where the user does"), ("all", "over all turns")):
        found = [(base["delta_loss"], tuned["delta_loss"]) for base, tuned in _of_segment(pairs, segment, "delta_loss")]
        if found and (segment != "all" or not parts):
            parts.append(f"{median(b for b, _ in found):.3f} against {median(t for _, t in found):.3f} nats/token {words}")
    ahead = sum(base["fvu_usual"] > tuned["fvu_usual"] for base, tuned in _of_segment(pairs, "all", "fvu_usual"))
    total = len(_of_segment(pairs, "all", "fvu_usual"))
    return (
        f"SAEs trained on {slice_['base']} cost {slice_['tuned']} in the median {' and '.join(parts)}, and its own SAEs leave "
        f"less variance unexplained in {ahead} of {plural(total, 'pair')}."
    )
