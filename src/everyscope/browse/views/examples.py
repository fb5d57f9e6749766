"""A latent's examples: tokens of a block, those that it fires on shaded by how strongly, cut short until they are opened.

An example whose shown tokens an earlier one has shown is left out, and counted: licences and tables repeat.
"""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from everyscope.browse.pieces import LONGEST, Piece, marked, running
from everyscope.browse.queries import Index

BEFORE, AFTER = 12, 8
"""Tokens shown around the chosen one while an example is closed [tokens]."""
ALIKE_BEFORE, ALIKE_AFTER = 8, 4
"""Tokens around the chosen one in which two examples must be alike to count as repeated [tokens]."""
AROUND = 48
"""Further tokens of the block shown on each side of the recorded window when it is open [tokens]."""
LEVELS = 10
"""Shades of activation, classes a1 to a10."""
GROUPS = (
    "Strongest",
    "Highest fifth of its firings",
    "Second fifth",
    "Middle fifth",
    "Fourth fifth",
    "Lowest fifth of its firings",
)
"""The groups of examples, by number; the fifths hold equally many firing tokens each."""


@dataclass(frozen=True)
class Example:
    """One example, ready for the page."""

    early: Markup
    """What is shown before the core once it is opened."""
    core: Markup
    """Shown always."""
    late: Markup
    """What follows the core once it is opened."""
    peak: float
    """Activation on the chosen token."""
    position: int
    """Of the chosen token in its block [tokens]."""
    source: str
    """Its document and split, in words."""
    text: str
    """What is shown always, as plain text."""
    upto: int
    """Characters of `text` up to the chosen token's end."""


def example_groups(index: Index, details: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The examples of a latent in their groups, each of them strongest first, and how many repeat an earlier one.

    No groups where it has no examples or the text is not stored.
    """
    examples = [example for example in details.get("examples") or [] if example.get("activations")]
    blocks = index.sequences(example["sequence"] for example in examples)
    kept = [example for example in examples if example["sequence"] in blocks]
    kept.sort(key=lambda example: (example["group"], -_peak(example)))
    num_stored = len(kept)
    kept = _without_repeats(kept, blocks)
    spans = [_span(example, len(blocks[example["sequence"]][2])) for example in kept]
    wanted: set[int] = set()
    for example, (first, last) in zip(kept, spans, strict=True):
        wanted.update(blocks[example["sequence"]][2][first:last].tolist())
    pieces = index.pieces(wanted)
    top = details.get("max_activation") or max(
        (value for example in kept for value in example["activations"] if value), default=1.0
    )
    groups: dict[int, list[Example]] = {}
    for example, span in zip(kept, spans, strict=True):
        split, document, ids = blocks[example["sequence"]]
        source = " · ".join(part for part in (document, (split or "").replace("_", " ")) if part)
        row = [pieces[token] for token in ids[span[0] : span[1]].tolist()]
        groups.setdefault(example["group"], []).append(_example(example, span[0], row, top, source))
    listed = [
        {"title": GROUPS[number] if 0 <= number < len(GROUPS) else f"Group {number}", "number": number, "examples": found}
        for number, found in sorted(groups.items())
    ]
    return listed, num_stored - len(kept)


def _peak(example: dict[str, Any]) -> float:
    """Its activation on the chosen token."""
    place = example["position"] - example["start"]
    return (example["activations"][place] if 0 <= place < len(example["activations"]) else None) or 0.0


def _without_repeats(examples: list[dict[str, Any]], blocks: dict[int, Any]) -> list[dict[str, Any]]:
    """The examples whose tokens around the chosen one no earlier example has."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for example in examples:
        ids, position = blocks[example["sequence"]][2], example["position"]
        around = tuple(ids[max(0, position - ALIKE_BEFORE) : position + ALIKE_AFTER + 1].tolist())
        if around not in seen:
            seen.add(around)
            kept.append(example)
    return kept


def _span(example: dict[str, Any], length: int) -> tuple[int, int]:
    """The tokens of the block that an open example shows: first, and the one behind the last."""
    start = min(max(0, example["start"]), length)
    return max(0, start - AROUND), min(length, start + len(example["activations"]) + AROUND)


def _example(example: dict[str, Any], first: int, row: list[Piece], top: float, source: str) -> Example:
    """`row` holds the tokens from `first` on."""
    values = {example["start"] + place: value for place, value in enumerate(example["activations"]) if value}
    position = example["position"]
    left, right = max(first, position - BEFORE), position + AFTER + 1

    def part(low: int, high: int) -> Markup:
        return shaded(row[max(0, low - first) : max(0, high - first)], low, values, top, position)

    around = row[left - first : max(0, right - first)]
    return Example(
        early=part(first, left),
        core=part(left, right),
        late=part(right, first + len(row)),
        peak=values.get(position, 0.0),
        position=position,
        source=source,
        text=plain_text(around),
        upto=len(plain_text(around[: position + 1 - left])),
    )


def plain_text(row: list[Piece]) -> str:
    """The text of some tokens; special ones have none, and halves of characters are left out."""
    return b"".join(piece.raw for piece in row if not piece.is_special).decode("utf-8", "ignore")


def shaded(row: list[Piece], first: int, values: dict[int, float], top: float, position: int | None = None) -> Markup:
    """Tokens as text, shaded where `values` (by position, the first token's being `first`) has an activation."""
    html: list[str] = []
    silent: list[Piece] = []
    for place, piece in enumerate(row, first):
        value = values.get(place)
        if not value and place != position:
            silent.append(piece)
            continue
        html.append(str(running(silent)))
        silent = []
        html.append(str(shaded_token(piece, value or 0.0, top, is_chosen=place == position)))
    return Markup("".join(html)) + running(silent)


def shaded_token(piece: Piece, value: float, top: float, *, is_chosen: bool = False) -> Markup:
    """One token, shaded by `value` as a share of `top`, with both in its tooltip."""
    classes = f"t a{level(value, top)}" + (" chosen" if is_chosen else "")
    # Spaces inside a shaded token are dots: there they are part of what the latent fires on.
    inside = piece.short if piece.is_special or len(piece.raw) > LONGEST else marked(piece.raw, dots_from=1)
    return Markup('<span class="{}" data-tip="{}">{}</span>').format(classes, f"{piece.plain}  {value:.3g}", inside)


def level(value: float, top: float) -> int:
    """The shade of `value`: 0 where it is none, else 1 to LEVELS."""
    if not value > 0 or not top > 0:
        return 0
    return min(LEVELS, max(1, -int(-LEVELS * value // top)))
