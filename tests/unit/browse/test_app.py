"""Every page, asked without a network: whole, harmless, and with a clear word where something is missing."""

import asyncio
import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser.asking import FakeLive, ask
from browser.invented_suite import SCRIPT, Shape, vocabulary, write_invented_suite
from invented_suite import GOLDEN, write_suite

from everyscope.base.errors import MissingExtra
from everyscope.browse.app import Browser
from everyscope.browse.light import Light
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index
from everyscope.browse.safe import HEADERS
from everyscope.suite.terms import TERMS

SAE = "resid_post/layer_1/width_256/average_l0_11"
OTHER = "resid_post/layer_1/width_64/average_l0_11"
PAGES = [
    "/",
    "/comparisons",
    "/compare",
    f"/compare?a={OTHER}&b={SAE}",
    "/compare?a=../../etc&b=%00",
    "/search",
    "/mine",
    "/help",
    "/search?q=return",
    "/search?q=%3Cscript%3Ealert('x')%3C%2Fscript%3E",
    "/text",
    "/steer",
    f"/sae/{SAE}/",
    f"/sae/{SAE}/?sort=entropy&order=up&show=all&page=3",
    f"/sae/{SAE}/?label=nothing-has-this",
    f"/sae/{SAE}/?token=return",
    f"/sae/{SAE}/0",
    f"/sae/{SAE}/19",
    f"/text?sae={SAE}&text=def%20f(x):%0A%20%20return",
    f"/steer?prompt=def&sae={SAE}&latent=3&strength=-2",
]
VOID = {"meta", "link", "input", "br"}
SVG_URL = re.compile(r"url\((?!#)|javascript:|//")


class Checked(HTMLParser):
    """Fails on an element closed in the wrong place, on inline scripts and styles, and on addresses that lead elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(page)
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag not in ("style", "img", "iframe", "object", "base")
        assert tag != "script" or found.get("src", "").startswith("/static/")
        for name, value in attrs:
            assert name != "style"
            assert not name.startswith("on")
            if name in ("href", "src", "action"):
                assert not SVG_URL.search(value or ""), value
                self.links.append(value or "")
        if found.get("id"):
            self.ids.append(found["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            assert not data.strip()
        self.text += data


@pytest.mark.parametrize("address", PAGES)
def test_every_page_is_whole_and_safe(get: Callable, address: str):
    answer = get(address, FakeLive)
    assert answer.status == 200
    assert HEADERS.items() <= answer.headers.items()
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    Checked(answer.text)


def test_every_link_of_the_first_pages_leads_somewhere(get: Callable):
    seen = set()
    for address in ("/", f"/sae/{SAE}/", f"/sae/{SAE}/0", "/compare"):
        seen |= {link.split("#")[0] for link in Checked(get(address).text).links} - {""}
    for link in sorted(seen)[::5]:
        assert get(link).status == 200, link


def test_hostile_tokens_stand_on_pages_as_text(get: Callable, index: Index):
    number = vocabulary(is_hostile=True).index(SCRIPT.encode())
    latent = number - 3
    page = get(f"/sae/{SAE}/{latent}").text
    assert SCRIPT not in page
    assert "&lt;script&gt;" in page
    assert SCRIPT.replace(" ", "·") in Checked(page).text
    raw = get(f"/sae/{SAE}/{latent}.json")
    assert raw.headers["content-type"] == "application/json"
    assert json.loads(raw.text)["tokens_text"][str(number)] == SCRIPT


def test_raw_json_is_the_published_row(get: Callable, index: Index):
    sae = index.find(SAE)
    found = json.loads(get(f"/sae/{SAE}/7.json").text)
    assert found["row"] == json.loads(json.dumps(index.details(sae, 7)))
    assert set(found["saes"].values()) <= {other.folder for other in index.saes}
    assert get(f"/sae/{SAE}/999999.json").status == 404


@pytest.mark.parametrize(
    "address",
    [
        "/nothing",
        "/sae/resid_post/layer_1/width_256/average_l0_99/",
        f"/sae/{SAE}/256",
        f"/sae/{SAE}/-1",
        f"/sae/{SAE}/99999999999999999999",
        "/sae/../../../etc/passwd",
        "/sae/..%2f..%2f/etc/x/y/",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2fetc%2fpasswd",
        "/static/style.css%00",
    ],
)
def test_an_address_that_leads_nowhere_is_a_page_that_says_so(get: Callable, address: str):
    answer = get(address)
    assert answer.status == 404
    assert HEADERS.items() <= answer.headers.items()
    assert "root:" not in answer.text


def test_pages_of_errors_lead_on(get: Callable):
    found = get(f"/sae/{SAE}/9999")
    assert found.status == 404
    assert {f"/sae/{SAE}/", f"/sae/{SAE}/255", "/"} <= set(Checked(found.text).links)


def test_every_number_on_pages_is_in_the_dictionary(get: Callable):
    """And every word that leads to the help is there."""
    known = set(re.findall(r'<div id="(\w+)">', get("/help").text))
    assert known == set(TERMS)
    for address in ("/", f"/sae/{SAE}/", f"/sae/{SAE}/27"):
        words = {link.partition("#")[2] for link in Checked(get(address).text).links if link.startswith("/help#")}
        assert len(words) > 5
        assert words <= known


def test_files_of_the_pages_have_their_types(get: Callable):
    for name, kind in (("style.css", "text/css"), ("browse.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        assert get(f"/static/{name}").headers["content-type"].startswith(kind)


def test_another_hosts_name_is_refused(get: Callable):
    assert get("/", host="evil.example").status == 400
    assert get("/", host="localhost:8017").status == 200


def test_a_fault_of_ours_is_a_page_with_headers(suite: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    preparation = Preparation(suite, cache)
    preparation.run()
    browser = Browser(preparation, None)
    monkeypatch.setattr(Browser, "_comparisons", lambda *_: 1 / 0)
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/comparisons", "query_string": b"", "headers": [(b"host", b"localhost")]}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(browser.app()(scope, receive, send))
    assert sent[0]["status"] == 500
    assert b"content-security-policy" in dict(sent[0]["headers"])
    assert b"internal error of everyscope" in sent[1]["body"]


def test_without_a_model_the_pages_say_what_brings_it(get: Callable):
    for page in ("text", "steer"):
        assert "everyscope browse SUITE" in get(f"/{page}").text
        assert get(f"/{page}?text=a&prompt=a").status == 200


def test_a_text_is_read_once_asked_and_only_then_the_model_is_made(get: Callable):
    made: list[FakeLive] = []

    def factory() -> FakeLive:
        made.append(FakeLive())
        return made[-1]

    get("/text", factory)
    assert not made
    page = Checked(get(f"/text?sae={SAE}&text=if%20<b>x</b>", factory).text)
    assert made[0].asked == [("if <b>x</b>", [SAE])]
    assert "<b>x</b>" in page.text
    assert "token 0" in page.text


def test_steering_speaks_in_multiples_of_the_highest_activation(get: Callable, index: Index):
    live = FakeLive()
    answer = get(
        f"/steer?prompt=def&sae={SAE}&latent=3&strength=-2&sae={OTHER}&latent=5&strength=0&tokens=7&seed=4", lambda: live
    )
    assert answer.status == 200
    (prompt, (unsteered, pushes), settings) = live.written[0]
    assert prompt == "def"
    assert not any(push.strength for push in unsteered)
    assert settings == {"num_tokens": 7, "temperature": 0.7, "seed": 4}
    tops = [index.details(index.find(folder), latent)["max_activation"] for folder, latent in ((SAE, 3), (OTHER, 5))]
    assert [(push.sae_id, push.latent) for push in pushes] == [(SAE, 3), (OTHER, 5)]
    assert [push.strength for push in pushes] == pytest.approx([-2 * tops[0], 0])


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("/text?sae=nothing&text=a", "no such sae"),
        (f"/text?sae={SAE}&text={'a' * 4001}", "4,001 characters"),
        (f"/steer?prompt=a&sae={SAE}&latent=256", "from 0 to 255"),
        (f"/steer?prompt=a&sae={SAE}&latent=1&strength=nan", "strength"),
        ("/steer?prompt=a&tokens=1000000", "tokens"),
        (f"/steer?prompt=a&sweep=1&sae={SAE}&latent=1&strength=1e-300&sae={OTHER}&latent=2&strength=1000", "closer together"),
        ("/text?text=a&by=size", "share or activation"),
        ("/text?text=a&at=-1", "token's number"),
        ("/text?text=a&at=7", "tokens 0 to 1"),
        ("/text?text=a&at=.3", "token's number"),
        ("/text?text=a&at=1.", "token's number"),
        (f"/sae/{SAE}/3/try?text={'a' * 4001}", "4,001 characters"),
        (f"/caption?sae={SAE}&latent=256", "from 0 to 255"),
    ],
)
def test_what_a_form_cannot_mean_is_told(get: Callable, address: str, word: str):
    answer = get(address, FakeLive)
    assert answer.status == 422
    assert word in Checked(answer.text).text.lower()


def test_a_model_that_cannot_be_made_is_told_and_asked_for_again(get: Callable):
    def factory() -> FakeLive:
        raise MissingExtra("torch", "live", "reading a text")

    answer = get(f"/text?sae={SAE}&text=a", factory)
    assert answer.status == 422
    assert "pip install" in answer.text


def test_suites_without_descriptions_say_which_command_makes_them(tmp_path: Path, cache: Path):
    shape = Shape(kinds=("embed",), layers=1, widths=(64,), l0s=(5.0,), is_described=False, is_explained=False)
    preparation = Preparation(write_invented_suite(tmp_path / "suite", shape), cache)
    index = preparation.run()
    app = Browser(preparation, None).app()
    for address in ("/", f"/sae/{index.saes[0].folder}/", f"/sae/{index.saes[0].folder}/3"):
        answer = ask(app, address)
        assert answer.status == 200
        assert "everyscope describe" in Checked(answer.text).text
    assert ask(app, f"/sae/{index.saes[0].folder}/3.json").status == 200
    for address in ("/search?q=x", "/compare", "/comparisons"):
        assert ask(app, address).status == 200


def test_columns_that_a_suite_lacks_are_left_out_of_its_pages(tmp_path: Path):
    """That of others has no mean activations, no token shares, and scores without counts."""
    preparation = Preparation(write_suite(tmp_path / "suite", GOLDEN), tmp_path / "cache")
    app = Browser(preparation, None).app()
    for sae in preparation.index.saes:
        for address in (f"/sae/{sae.folder}/", *(f"/sae/{sae.folder}/{latent}" for latent in range(6))):
            answer = ask(app, address)
            assert answer.status == 200
            Checked(answer.text)


def test_a_damaged_sae_has_a_page_that_names_the_file(suite: Path, tmp_path: Path):
    copy = Path(shutil.copytree(suite, tmp_path / "suite"))
    (copy / SAE / "latents.parquet").write_bytes(b"PAR1")
    preparation = Preparation(copy, tmp_path / "cache")
    preparation.run()
    app = Browser(preparation, None).app()
    for address, status in (("/", 200), (f"/sae/{SAE}/", 200), (f"/sae/{SAE}/3", 404)):
        answer = ask(app, address)
        assert answer.status == status
        assert "cannot be read as Parquet" in Checked(answer.text).text
        assert str(tmp_path) not in answer.text


def test_an_index_that_cannot_be_written_is_said_on_pages_that_need_it(suite: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("")
    preparation = Preparation(suite, tmp_path / "cache")
    app = Browser(preparation, None).app()
    assert ask(app, "/").status == 200
    answer = ask(app, f"/sae/{SAE}/3")
    assert (answer.status, "--cache DIR" in answer.text) == (500, True)
    assert "--cache DIR" in json.loads(ask(app, "/state").text)["error"]


def test_whole_answers_are_compressed_and_not_sent_twice(get: Callable):
    plain = get(f"/sae/{SAE}/0")
    small = get(f"/sae/{SAE}/0", headers={"accept-encoding": "br, gzip"})
    assert gzip.decompress(small.body) == plain.body
    assert len(small.body) < len(plain.body) / 3
    assert small.headers["content-encoding"] == "gzip"
    assert small.headers["content-length"] == str(len(small.body))
    assert small.headers["etag"] == plain.headers["etag"]
    again = get(f"/sae/{SAE}/0", headers={"if-none-match": plain.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert HEADERS.items() <= again.headers.items()
    assert get(f"/sae/{SAE}/1", headers={"if-none-match": plain.headers["etag"]}).status == 200
    assert "etag" not in get("/state").headers


def test_streams_go_through_as_they_come():
    async def stream(scope: dict, receive: Callable, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for part in (b"a" * 2000, b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    answer = ask(Light(stream), "/", headers={"accept-encoding": "gzip"})
    assert answer.body == b"a" * 2000 + b"b"
    assert not {"etag", "content-encoding"} & set(answer.headers)


def test_many_threads_read_one_index(index: Index):
    sae, answers = index.saes[0], []
    threads = [threading.Thread(target=lambda: answers.append(index.details(sae, 5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [index.details(sae, 5)] * 8


def test_browsing_loads_neither_torch_nor_matplotlib():
    code = "import sys, everyscope.browse.run, everyscope.browse.export\n"
    code += "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
