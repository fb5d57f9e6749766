"""Pages as HTML: the templates, what they all know, and the few formats in which they write numbers."""

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from everyscope.base.progress import human_count
from everyscope.browse.labels import dot, kind_in_words, label_html, label_plain
from everyscope.browse.links import Links
from everyscope.browse.queries import Index
from everyscope.browse.views.suite import tip
from everyscope.suite.layout import width_label
from everyscope.suite.terms import TERMS

HERE = Path(__file__).parent
TEMPLATES, STATIC = HERE / "templates", HERE / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""What a file of static/ is, by its ending."""


def static_files() -> dict[str, bytes]:
    """Every file of static/ by name: what is served is looked up here, so that no address reaches the file system."""
    return {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}


def stamps(files: dict[str, bytes]) -> dict[str, str]:
    """A short hash of each file, for addresses that change when the file does."""
    return {name: hashlib.sha256(content).hexdigest()[:12] for name, content in files.items()}


def environment() -> Environment:
    """The templates: everything is escaped, and a name that no view gave is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals["terms"] = TERMS
    made.filters.update(
        href=href,
        significant=significant,
        percent=percent,
        human=human_count,
        width_label=width_label,
        sae_tip=tip,
        share=share,
        share_of_tokens=share_of_tokens,
        fixed=fixed,
        label=label_html,
        label_plain=label_plain,
        dot=dot,
        kind_in_words=kind_in_words,
    )
    return made


def render(made: Environment, page: str, index: Index | None, links: Links, **view: Any) -> str:
    """The template `page`.html.j2, filled."""
    return made.get_template(f"{page}.html.j2").render(index=index, links=links, page=page, **view)


def href(address: str | None) -> Markup:
    """The attribute of an anchor; nothing where there is no such page, which makes the anchor plain text."""
    return Markup(' href="{}"').format(address) if address else Markup("")


def significant(value: float | None, digits: int = 3) -> str:
    """A number with `digits` digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share in per cent, finer the smaller it is; a dash where there is none."""
    if not value:
        return "–" if value is None else "0"
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def share(value: float | None) -> str:
    """How often something happens, as people compare it: in per cent, or as one in N."""
    if value is None:
        return "–"
    if value >= 0.001 or value <= 0:
        return percent(value)
    return f"1 in {float(f'{1 / value:.3g}'):,.0f}"


def share_of_tokens(value: float | None) -> str:
    """The same, of tokens."""
    return f"{share(value)} tokens" if share(value).startswith("1 in") else f"{share(value)} of tokens"


def fixed(value: float) -> str:
    """A number in three digits, zeros too, so that a column is even."""
    return f"{value:#.3g}".rstrip(".")
