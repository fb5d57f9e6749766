import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invented_scores import add_sae

from everyscope.publish import run as publish
from everyscope.publish.config import PublishConfig
from everyscope.sites.names import Site

EVERY = [
    "fidelity",
    "depth",
    "positions",
    "widths",
    "splitting",
    "transfer",
    "texts",
    "precision",
    "firing",
    "uniformity",
    "probing",
]
ALWAYS = ["fidelity", "depth", "positions", "firing", "uniformity"]


class Elements(HTMLParser):
    """Counts elements, and fails on one that is closed in the wrong place."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.counts = [], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sections(suite: Path) -> list[str]:
    return re.findall(r'<section id="([a-z]+)">', (suite / "report/index.html").read_text())


def test_the_report_is_one_file_without_addresses(published: PublishConfig):
    page = (published.out / "report/index.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|src=|<link|url\((?!#)", page)
    assert "invented rows &lt;&amp;&gt;" in page
    elements = Elements(page)
    assert elements.open == []
    assert elements.counts["figure"] == page.count("<figcaption>")
    assert "prefers-color-scheme: dark" in page
    for reference in set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)):
        assert f'id="{"".join(reference)}"' in page
    for path in re.findall(r'href="((?!#|\.\.)[^"]+)"', page):
        assert (published.out / "report" / path).is_file()


def test_what_was_measured_has_a_section_with_pictures_in_two_formats(published: PublishConfig):
    assert sections(published.out) == [*EVERY, "ranking", "cost", "saes"]
    folder = published.out / "report"
    stems = {path.stem for path in folder.iterdir()} - {"index"}
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        *(f"{stem}.{form}" for stem in stems for form in ("pdf", "png")),
    }
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))
    page = (folder / "index.html").read_text()
    for section in re.findall(r"<section.*?</section>", page, re.DOTALL):
        assert re.search(r'class="note basis">[^<]*tokens', section)
        assert len(re.findall(r'class="says">[^<]{20,}\.</p>', section)) == 1


@pytest.mark.usefixtures("without_figures")
def test_what_was_not_measured_has_no_section(few: PublishConfig):
    assert sections(publish.run(few).suite) == [*ALWAYS, "ranking", "saes"]


@pytest.mark.usefixtures("without_figures")
def test_a_suite_of_one_sae_has_a_report(tmp_path: Path):
    config = PublishConfig(
        trained=tmp_path / "train", scores=tmp_path / "scores", out=tmp_path / "suite", title="One", model="some/model"
    )
    add_sae(config, Site("embed", 0), "one", 512, 0.5)
    assert sections(publish.run(config).suite) == ["fidelity", "positions", "firing", "uniformity", "saes"]
    assert (config.out / "report/fvu_against_l0.png").is_file()
