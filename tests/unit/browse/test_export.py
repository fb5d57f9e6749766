"""An export is the served pages, with relative links, each of which leads to a file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest
from browser.asking import ask
from browser.invented_suite import Shape, write_invented_suite
from invented_graph import SCRIPT, invented_graph

from everyscope.base.errors import ConfigError, DataError
from everyscope.browse.app import Browser
from everyscope.browse.config import ExportConfig
from everyscope.browse.export import MARK, run
from everyscope.browse.preparation import Preparation
from everyscope.circuits.files import ENDING, FOLDER
from everyscope.circuits.writing import write_graph

SHAPE = Shape(kinds=("resid_post",), layers=1, widths=(60, 70), l0s=(5.0,), num_sequences=12, context=48, is_hostile=True)
NARROW, WIDE = "resid_post/layer_0/width_60/average_l0_5", "resid_post/layer_0/width_70/average_l0_5"


class Dom(HTMLParser):
    """What a page holds, apart from where its links lead and what only a server can do."""

    LINKS: ClassVar[set[str]] = {"href", "src", "action", "hidden", "data-address"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [(name, value) for name, value in attrs if name not in self.LINKS]))
        self.links += [value for name, value in attrs if name in ("href", "src") and value and not value.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.found.append((data,))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_invented_suite(folder / "suite", SHAPE)
    write_graph(folder / "suite" / FOLDER / f"a graph & more{ENDING}", invented_graph([(NARROW, 60)]))
    (folder / "suite" / FOLDER / f"damaged{ENDING}").write_bytes(b"nothing")
    result = run(ExportConfig(suite=folder / "suite", out=folder / "pages", cache=folder / "cache"))
    assert result.first_page.is_file()
    assert result.num_pages == len(list((folder / "pages").rglob("*.html")))
    return folder


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("/", "index.html"),
        ("/comparisons", "comparisons.html"),
        ("/compare", "compare.html"),
        (f"/compare?a={NARROW}&b={WIDE}", "compare/0-1.html"),
        ("/mine", "mine.html"),
        ("/help", "help.html"),
        ("/text", "text.html"),
        ("/steer", "steer.html"),
        (f"/sae/{WIDE}/", f"sae/{WIDE}/index.html"),
        (f"/sae/{WIDE}/?page=2", f"sae/{WIDE}/page-2.html"),
        *((f"/sae/{WIDE}/{latent}", f"sae/{WIDE}/0/{latent}.html") for latent in range(0, 70, 7)),
    ],
)
def test_exported_pages_are_the_served_ones_apart_from_links(place: Path, address: str, file: str):
    preparation = Preparation(place / "suite", place / "cache")
    preparation.run()
    served = ask(Browser(preparation, None).app(), address)
    assert served.status == 200
    assert Dom((place / "pages" / file).read_text(encoding="utf-8")).found == Dom(served.text).found


def test_every_link_is_relative_and_leads_to_a_file(place: Path):
    pages = sorted((place / "pages").rglob("*.html"))
    assert len(pages) > 130
    for page in pages:
        for link in Dom(page.read_text(encoding="utf-8")).links:
            assert not link.startswith(("/", "http"))
            assert (page.parent / unquote(link.split("#")[0])).resolve().is_file(), f"{page}: {link}"


def test_an_export_can_be_cut_short_and_is_replaced_whole(place: Path, tmp_path: Path):
    config = ExportConfig(suite=place / "suite", out=tmp_path / "out", max_latents=3, cache=place / "cache")
    run(config)
    assert len(list((tmp_path / "out").glob("sae/*/*/*/*/0/*.html"))) == 6
    (tmp_path / "out/old.html").write_text("")
    run(config)
    assert not (tmp_path / "out/old.html").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_of_somebody_elses_is_never_replaced(place: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="no export"):
        run(ExportConfig(suite=place / "suite", out=tmp_path, cache=place / "cache"))
    assert (tmp_path / "mine.txt").exists()
    (tmp_path / "empty").mkdir()
    run(ExportConfig(suite=place / "suite", out=tmp_path / "empty", max_latents=1, cache=place / "cache"))
    assert (tmp_path / "empty" / MARK).exists()


def test_what_is_no_suite_is_not_exported(tmp_path: Path):
    with pytest.raises(DataError, match="no suite"):
        run(ExportConfig(suite=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_graphs_are_exported_with_all_that_their_pages_need(place: Path):
    pages = place / "pages"
    listed = (pages / "circuits.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(circuit/[^"]+)"', listed) == ["circuit/a%20graph%20%26%20more.html"]
    page = (pages / "circuit" / "a graph & more.html").read_text(encoding="utf-8")
    assert 'id="graph-data"' in page
    assert "data-graph" not in page
    assert SCRIPT not in page
    data = json.loads(re.search(r'id="graph-data">(.*?)</script>', page, re.DOTALL)[1])
    for node in data["nodes"]:
        assert node["kind"] != "latent" or (pages / "circuit" / node["href"]).resolve().is_file()
