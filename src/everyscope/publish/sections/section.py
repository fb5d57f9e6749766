"""What a section of the report is: a title, one sentence that says what to see, pictures, and perhaps a table."""

from dataclasses import dataclass
from statistics import median

from everyscope.publish.drawing.pictures import Picture


@dataclass(frozen=True)
class ReportCell:
    """One cell of a table."""

    text: str
    key: float | str | None = None
    """What it is sorted by; None by its text."""
    link: str | None = None
    """Where it leads, from the report's page."""
    is_soft: bool = False
    """Whether it is greyed, as ties are."""


@dataclass(frozen=True)
class ReportTable:
    """A table that readers can sort."""

    columns: tuple[str, ...]
    rows: tuple[tuple[ReportCell, ...], ...]


@dataclass(frozen=True)
class Section:
    """One section of the report, below its title its basis and what to see."""

    anchor: str
    """Its id in the page."""
    title: str
    basis: str
    """Tokens, data and mask of its numbers."""
    says: str
    """One sentence that says what to see."""
    notes: tuple[str, ...] = ()
    """How to read it."""
    pictures: tuple[Picture, ...] = ()
    table: ReportTable | None = None


def range_text(values: list[float], form: str = ".3f") -> str:
    """The lowest and the highest value, or the one there is."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def middle_text(values: list[float], form: str = ".3f") -> str:
    """The median, and the range where there are several values."""
    text = format(median(values), form)
    return text if len(values) == 1 else f"{text} in the median ({range_text(values, form)})"


def plural(count: int, noun: str) -> str:
    """`count` with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
