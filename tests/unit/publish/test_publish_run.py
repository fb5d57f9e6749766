import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invented_scores import SITES, add_sae
from rich.console import Console
from small_scope import tree_bytes

from everyscope.base.errors import DamagedData, DataError
from everyscope.publish import run as publish
from everyscope.publish.config import PublishConfig
from everyscope.publish.table import suite_rows, suite_table
from everyscope.sites.names import Site
from everyscope.suite.reader import load_suite
from everyscope.suite.records import verify_suite


def test_the_suite_is_the_tree_of_the_contract(published: PublishConfig):
    result = publish.run(published)
    suite = load_suite(result.suite)
    assert len(suite) == 36
    assert result.report == result.suite / "report/index.html"
    for entry in suite:
        assert re.fullmatch(r"(attn_out|mlp_out|resid_post)/layer_[01]/width_(512|1k)/average_l0_\d+(_\d+)?", entry.record.folder)
        names = {path.name for path in entry.folder.iterdir()}
        assert names == {"params.npz", "cfg.json", "sae_weights.safetensors", "metrics.json", "latents.parquet"}
        assert entry.sae().d_sae == entry.width
        assert entry.metrics.l0 == json.loads((entry.folder / "metrics.json").read_text())["l0"]
    site = Site("mlp_out", 1)
    assert [entry.site for entry in suite.find(site, 512)] == [site] * 3
    middle = suite.find(site, 512)[1]
    assert suite.nearest(site, 512, middle.metrics.l0 + 0.01) == middle
    with pytest.raises(DataError, match="widths there: 512, 1024"):
        suite.nearest(site, 2048, 10)
    verify_suite(result.suite)


def test_publishing_twice_does_nothing_and_bytes_do_not_vary(published: PublishConfig, monkeypatch: pytest.MonkeyPatch):
    publish.run(published)
    bytes_before = tree_bytes(published.out)
    publish.run(published.model_copy(update={"out": published.out.parent / "elsewhere"}))
    assert tree_bytes(published.out.parent / "elsewhere") == bytes_before
    monkeypatch.setattr(publish, "read_sae", lambda *_: pytest.fail("there was nothing to do"))
    publish.run(published)
    assert tree_bytes(published.out) == bytes_before


def test_an_interrupted_publication_has_no_index_and_is_finished_later(published: PublishConfig, monkeypatch: pytest.MonkeyPatch):
    publish.run(published)
    want = tree_bytes(published.out)
    with monkeypatch.context() as patched:
        patched.setattr(publish, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish.run(published.model_copy(update={"title": "Another"}))
    assert not (published.out / "suite.json").exists()
    publish.run(published)
    assert tree_bytes(published.out) == want


def test_what_is_no_longer_trained_leaves_the_suite_but_files_of_others_stay(published: PublishConfig):
    publish.run(published)
    gone, kept = (
        published.out / "mlp_out/layer_0/width_1k/average_l0_999",
        published.out / "mlp_out/layer_0/width_1k/average_l0_998",
    )
    for folder in (gone, kept):
        folder.mkdir(parents=True)
        (folder / "params.npz").write_bytes(b"old")
    (kept / "notes.txt").write_text("mine")
    publish.run(published.model_copy(update={"title": "Another"}))
    assert not gone.exists()
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_two_saes_of_one_rounded_l0_get_folders_of_their_own(published: PublishConfig, capsys: pytest.CaptureFixture[str]):
    add_sae(published, SITES[0], "twin", 512, 0.2)
    result = publish.run(published)
    folders = [entry.record.folder for entry in load_suite(result.suite).find(SITES[0], 512)]
    assert len(folders) == len(set(folders)) == 4
    assert any(folder.endswith("_2") for folder in folders)
    assert "Two SAEs round to" in capsys.readouterr().err


def test_a_flipped_byte_is_named(published: PublishConfig):
    publish.run(published)
    for name in ("report/index.html", "resid_post/layer_1/width_1k"):
        path = published.out / name
        path = path if path.is_file() else next(path.glob("*/params.npz"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        original, _ = path.read_bytes(), path.write_bytes(bytes(content))
        with pytest.raises(DamagedData, match=re.escape(str(path))):
            verify_suite(published.out)
        path.write_bytes(original)
    verify_suite(published.out)
    (published.out / "README.md").unlink()
    with pytest.raises(DamagedData, match=r"README\.md.*missing"):
        verify_suite(published.out)


def test_missing_scores_and_missing_saes_are_named(published: PublishConfig):
    with pytest.raises(DataError, match="everyscope train"):
        publish.run(published.model_copy(update={"trained": published.out / "nothing"}))
    (published.scores / SITES[0].folder / "w512_0.2" / "metrics.json").unlink()
    with pytest.raises(DataError, match=r"w512_0\.2.*everyscope evaluate"):
        publish.run(published)
    assert not published.out.exists()


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


def test_the_report_is_one_file_without_addresses(published: PublishConfig):
    page = publish.run(published).report.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|src=|<link|url\((?!#)", page)
    assert "invented rows &lt;&amp;&gt;" in page
    elements = Elements(page)
    assert elements.open == []
    assert elements.counts["tr"] == 37
    assert elements.counts["figure"] == 2 * 3 + 2
    assert "prefers-color-scheme: dark" in page
    for reference in set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)):
        assert f'id="{"".join(reference)}"' in page


def test_the_card_and_tables_show_every_sae(published: PublishConfig):
    publish.run(published)
    index = load_suite(published.out).index
    card = (published.out / "README.md").read_text()
    assert sum(line.startswith(("| attn_out", "| mlp_out", "| resid_post")) for line in card.splitlines()) == 36
    for picture in re.findall(r"\((report/[^)]+)\)", card):
        assert (published.out / picture).read_bytes().startswith(b"\x89PNG")
    console = Console(width=140, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(suite_table(index))
    assert console.export_text().count("resid_post") == 12
    assert [row["folder"] for row in json.loads(json.dumps(suite_rows(index)))] == [sae.folder for sae in index.saes]
