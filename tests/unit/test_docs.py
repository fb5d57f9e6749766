"""The documentation names nothing that is not there: links, headings, pages of the navigation, names of the package.

`make docs` checks more, but needs packages that the other checks do without.
"""

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import everyscope

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks and spans of code."""
    return re.sub(r"`[^`\n]+`", "code", FENCE.sub("", page.read_text(encoding="utf-8")))


@cache
def headings(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as the site makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return frozenset(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles)


def links(page: Path) -> Iterator[str]:
    return (link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link))


def pages_of(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list | dict):
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert not broken


def test_pages_of_the_site_link_within_it():
    """What lies outside docs/ is not on the site: it is named, not linked."""
    docs = ROOT / "docs"
    outside = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        if docs in page.parents
        for link in links(page)
        if not (page.parent / link.partition("#")[0]).resolve().is_relative_to(docs)
    ]
    assert not outside


def test_the_navigation_has_every_page_once():
    assert sorted(pages_of(SITE["nav"])) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    )


def test_the_reference_has_every_public_name_and_no_other():
    named = [
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    missing = {f"everyscope.{name}" for name in everyscope.__all__} - set(named)
    assert not missing
    for name in named:
        home, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(home), last)
        except AttributeError:
            found = importlib.import_module(name)
        assert found.__doc__
