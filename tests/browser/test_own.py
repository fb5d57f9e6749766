"""One's own things in a real browser: stars, labels, notes, lists, files taken in, by mouse, keys and finger."""

import json
import re
from pathlib import Path

import pytest
from browser.test_pages import ADDRESSES, SAE, VIEWS, Watched, base, chromium, playwright, pytestmark, watched

__all__ = ["base", "chromium", "pytestmark", "watched"]

FIRST, SECOND = f"{SAE}/27", f"{SAE}/28"


def test_what_one_keeps_comes_back(watched: Watched):
    page = watched.page
    watched.go(f"/sae/{FIRST}")
    page.click("#star")
    assert page.get_attribute("#star", "aria-pressed") == "true"
    page.locator("#own-open").focus()
    page.keyboard.press("Enter")  # the first box has the focus
    page.keyboard.type("my <b>label</b>")
    page.keyboard.press("Tab")
    page.keyboard.type("a note n p ? /")  # in a box, letters are letters
    page.keyboard.press("Tab")
    page.keyboard.type("returns, second")
    page.reload()
    assert page.get_attribute("#star", "aria-pressed") == "true"
    assert page.inner_text("#own-label") == "my <b>label</b>"
    watched.go(f"/sae/{SAE}/?show=all&sort=latent&order=up")
    assert "★ my <b>label</b> ·" in page.inner_text("main")
    watched.go("/mine")
    row = page.inner_text("#mine-rows tr")
    assert all(text in row for text in ("★ my <b>label</b>", "a note n p ? /", "returns, second", FIRST))
    page.click("#mine-rows a")
    assert page.url.endswith(FIRST)
    page.click("#star")
    page.click("#own-open")
    for box in ("label", "note", "lists"):
        page.fill(f"#own [name={box}]", "")
    watched.go("/mine")
    playwright.expect(page.locator("#mine-none")).to_be_visible()


def test_a_list_has_an_address(watched: Watched):
    page = watched.page
    for place in (FIRST, SECOND):
        watched.go(f"/sae/{place}")
        page.click("#own-open")
        page.fill("#own [name=lists]", "pair")
    watched.go("/mine")
    page.select_option("#mine-list", "pair")
    page.click("#mine-share")
    address = page.url
    page.evaluate("localStorage.clear()")
    page.goto("about:blank")
    page.goto(address)
    assert page.locator("#mine-rows tr").count() == 2
    assert "pair: 2 latents" in page.inner_text("#mine-shared")
    page.click("#mine-keep")
    playwright.expect(page.locator("#mine-shared")).to_be_hidden()
    assert page.locator("#mine-rows tr").count() == 2


@pytest.mark.parametrize("watched", [{}, VIEWS["phone light"]], indirect=True, ids=["desktop", "phone"])
def test_files_are_written_and_taken_in_again(watched: Watched, tmp_path: Path):
    page = watched.page
    watched.go(f"/sae/{FIRST}")
    page.click("#star")
    watched.go("/mine")
    with page.expect_download() as saved:
        page.click("#mine-save")
    saved.value.save_as(tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text())["latents"][FIRST]["star"] is True
    page.evaluate("localStorage.clear()")
    page.reload()
    page.set_input_files("#mine-file", tmp_path / "mine.json")
    playwright.expect(page.locator("#mine-says")).to_contain_text("1 taken in")
    assert page.locator("#mine-rows tr").count() == 1


HOSTILE = [
    "no json",
    "[]",
    "null",
    '{"latents": []}',
    '{"latents": {"javascript:alert(1)": {"star": true}}}',
    '{"latents": {"../../../etc/1": {"star": true}, "__proto__": {"star": true}, "constructor": 3}}',
    '{"__proto__": {"latents": {"a": 1}}}',
    json.dumps({"latents": {f"{SAE}/27/28": {"star": True}, f"{SAE}/-1": {}, f"https://x.example/{SAE}/1": {"star": True}}}),
]


def test_hostile_files_do_no_harm(watched: Watched, tmp_path: Path):
    page = watched.page
    watched.go("/mine")
    for number, content in enumerate(HOSTILE):
        (tmp_path / f"{number}.json").write_text(content)
        page.evaluate("document.getElementById('mine-says').textContent = ''")
        page.set_input_files("#mine-file", tmp_path / f"{number}.json")
        playwright.expect(page.locator("#mine-says")).not_to_be_empty()
        assert page.locator("#mine-rows tr").count() == 0, content
    script = "<img src=x onerror=alert(1)>"
    entry = {"label": script, "note": script * 500, "lists": [script, 7, {}], "star": "yes", "changed": "1e999"}
    (tmp_path / "texts.json").write_text(json.dumps({"latents": {FIRST: entry, SECOND: {"label": {}, "note": [1]}}}))
    page.set_input_files("#mine-file", tmp_path / "texts.json")
    playwright.expect(page.locator("#mine-rows tr")).to_have_count(2)
    assert script in page.inner_text("#mine-rows")
    assert len(page.locator("#mine-rows td").nth(2).inner_text()) <= 4000
    assert page.evaluate("document.images.length") == 0
    for link in page.locator("#mine-rows a").all():
        assert re.fullmatch(rf"/sae/{SAE}/\d+", link.get_attribute("href") or "")
    watched.go(f"/sae/{FIRST}")
    assert page.inner_text("#own-label") == script
    assert page.evaluate("({}).star") is None
    watched.go(f"/mine#name={script}&latents=javascript:alert(1),{FIRST},../../x/1")
    assert page.locator("#mine-rows tr").count() == 1


@pytest.mark.parametrize("watched", [{"viewport": {"width": 390, "height": 844}, "has_touch": True}], indirect=True)
def test_a_finger_sees_what_a_word_means(watched: Watched):
    page = watched.page
    watched.go(ADDRESSES["sae"])
    word = page.locator("a.term").first
    word.tap()
    assert "active on a token" in page.inner_text("#tip")
    assert "/sae/" in page.url
    with page.expect_navigation():
        word.tap()
    assert page.url.endswith("/help#l0")
    assert "active on a token" in page.inner_text("#l0")


def test_keys_see_what_a_word_means(watched: Watched):
    page = watched.page
    watched.go(ADDRESSES["sae"])
    page.locator("a.term").first.focus()
    assert "active on a token" in page.inner_text("#tip")
