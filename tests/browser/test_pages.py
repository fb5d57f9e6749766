"""Every page in a real browser: nothing from elsewhere, no complaint in the console, keys, colours, phones, hostile tokens.

EVERYSCOPE_SCREENSHOTS=FOLDER keeps the screenshots; EVERYSCOPE_CHROMIUM names the browser where it is not called chromium.
EVERYSCOPE_AXE names axe-core's axe.min.js, as the package axe-playwright-python brings it: every page is then held to its rules.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn
from browser.asking import FakeLive
from browser.invented_suite import SCRIPT, Shape, vocabulary, write_invented_suite

from everyscope.browse.app import Browser as Pages
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page, Route

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = os.environ.get("EVERYSCOPE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = os.environ.get("EVERYSCOPE_AXE", "")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install Debian's chromium, or set EVERYSCOPE_CHROMIUM"
)

SHAPE = Shape(kinds=("mlp_out", "resid_post"), layers=2, widths=(64, 256), l0s=(5.2, 25.4), context=96, is_hostile=True)
SAE, OTHER = "resid_post/layer_1/width_256/average_l0_25", "resid_post/layer_1/width_64/average_l0_25"
TEXT = "def%20mean(values):%0A%20%20%20%20return%20sum(values)"
ADDRESSES = {
    "suite": "/",
    "sae": f"/sae/{SAE}/",
    "latent": f"/sae/{SAE}/27",
    "dead": f"/sae/{SAE}/19",
    "search": "/search?q=return",
    "compare": f"/compare?a={OTHER}&b={SAE}",
    "choose": "/compare",
    "comparisons": "/comparisons",
    "mine": "/mine",
    "help": "/help",
    "text": f"/text?sae={SAE}&text={TEXT}",
    "steer": f"/steer?prompt=def&sae={SAE}&latent=27&strength=2",
    "missing": "/sae/a/b/c/d/",
}
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
UNNAMED = """() => [...document.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, svg")]
  .filter((node) => !node.closest("[aria-hidden=true], [hidden]"))
  .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length || node.title))
  .map((node) => node.outerHTML.slice(0, 200))"""


@dataclass
class Watched:
    """A page, and everything about it that should not be."""

    page: "Page"
    base: str
    wrong: list[str] = field(default_factory=list)

    def go(self, address: str) -> None:
        self.page.goto(self.base + address, wait_until="networkidle")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread; gives its address."""
    folder = tmp_path_factory.mktemp("browser")
    preparation = Preparation(write_invented_suite(folder / "suite", SHAPE), folder / "cache")
    preparation.run()
    app = Pages(preparation, FakeLive).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator["Chromium"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def watched(request: pytest.FixtureRequest, chromium: "Chromium", base: str) -> Iterator[Watched]:
    """A page that records foreign requests, errors and dialogs; at the end there must be none. Parameters are the context's."""
    context = chromium.new_context(**{"viewport": DESKTOP, "locale": "en", **getattr(request, "param", {})})
    watched = Watched(context.new_page(), base)

    def only_ours(route: "Route") -> None:
        if route.request.url.startswith(base):
            route.continue_()
        else:
            watched.wrong.append(f"asks for {route.request.url}")
            route.abort()

    context.route("**/*", only_ours)
    watched.page.on("pageerror", lambda error: watched.wrong.append(f"error: {error}"))
    watched.page.on("dialog", lambda dialog: watched.wrong.append("a dialog") or dialog.dismiss())
    watched.page.on(
        "console", lambda message: watched.wrong.append(message.text) if message.type in ("error", "warning") else None
    )
    yield watched
    context.close()
    assert not watched.wrong


def screenshot(watched: Watched, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("EVERYSCOPE_SCREENSHOTS", tmp_path))
    watched.page.screenshot(path=folder / f"{name}.png", full_page=True)


def theme(watched: Watched) -> str:
    return watched.page.evaluate("getComputedStyle(document.body).backgroundColor")


VIEWS = {
    "desktop light": {"viewport": DESKTOP, "color_scheme": "light"},
    "desktop dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone light": {"viewport": PHONE, "color_scheme": "light", "has_touch": True},
    "phone dark": {"viewport": PHONE, "color_scheme": "dark", "has_touch": True},
}


@pytest.mark.parametrize("watched", list(VIEWS.values()), indirect=True, ids=list(VIEWS))
def test_every_page_in_every_light(watched: Watched, tmp_path: Path, request: pytest.FixtureRequest):
    for name, address in ADDRESSES.items():
        watched.go(address)
        width, shown = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= shown, f"{name} is wider than the screen"
        assert watched.page.evaluate(UNNAMED) == [], name
        assert watched.page.title()
        screenshot(watched, tmp_path, f"{name} {request.node.callspec.id}".replace(" ", "_"))
    watched.wrong[:] = [entry for entry in watched.wrong if "404" not in entry]  # the browser notes the page that is missing


@pytest.mark.skipif(not AXE, reason="EVERYSCOPE_AXE names no axe.min.js")
@pytest.mark.parametrize("watched", list(VIEWS.values()), indirect=True, ids=list(VIEWS))
def test_axe_finds_nothing(watched: Watched):
    found = []
    for name, address in ADDRESSES.items():
        watched.go(address)
        watched.page.evaluate(Path(AXE).read_text(encoding="utf-8"))
        violations = watched.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((all) => all.violations)")
        found += [(name, one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in violations]
    assert not found
    watched.wrong[:] = [entry for entry in watched.wrong if "404" not in entry]


SMALLEST = """() => Math.min(99, ...[...document.querySelectorAll("main svg text")].filter((text) => text.getClientRects().length)
  .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""


@pytest.mark.parametrize("watched", [VIEWS["desktop light"], VIEWS["phone light"]], indirect=True, ids=["desktop", "phone"])
def test_type_in_figures_can_be_read(watched: Watched):
    for name in ("suite", "sae", "latent", "compare"):
        watched.go(ADDRESSES[name])
        assert watched.page.evaluate(SMALLEST) >= 11, name


@pytest.mark.parametrize("watched", [{"color_scheme": "light"}], indirect=True)
def test_keys(watched: Watched):
    page = watched.page
    watched.go(f"/sae/{SAE}/27")
    for key, want in (("n", "/28"), ("n", "/29"), ("p", "/28"), ("r", None), ("u", f"{SAE}/")):
        before = page.url
        with page.expect_navigation():
            page.keyboard.press(key)
        assert page.url != before
        assert want is None or page.url.endswith(want)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("n?d")  # in a box, letters are letters
    assert page.input_value("#find") == "n?d"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")
    light = theme(watched)
    page.keyboard.press("d")
    dark = theme(watched)
    assert light != dark
    page.reload()
    assert theme(watched) == dark
    page.click("#theme")
    assert theme(watched) == light


def test_focus_can_be_seen_and_the_page_be_skipped_to(watched: Watched):
    watched.go("/")
    watched.page.keyboard.press("Tab")
    assert watched.page.evaluate("document.activeElement.className") == "skip"
    for _ in range(3):
        watched.page.keyboard.press("Tab")
        assert watched.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_tabs_tables_and_the_plot(watched: Watched):
    page = watched.page
    watched.go("/")
    page.click("label[for=heat-delta_loss]")
    assert page.locator(".tabs .tabbed:visible").first.inner_text().startswith("Rise of")
    page.locator("table.sortable th:nth-child(3) button").first.click()
    for is_again in (False, True):  # the address keeps the order
        for table in page.locator("table.sortable").all():
            numbers = [float(text.split()[0]) for text in table.locator("td:nth-child(3)").all_inner_texts()]
            assert len(numbers) > 4
            assert numbers == sorted(numbers)
        if not is_again:
            page.reload()
    plot = page.locator("svg.pareto:visible").first
    plot.scroll_into_view_if_needed()
    ticks, places = plot.locator(".tick").all_text_contents(), plot.locator(".point").evaluate_all(TRANSFORMS)
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    playwright.expect(plot).to_have_class(re.compile("zoomed"))
    assert plot.locator(".point").evaluate_all(TRANSFORMS) != places
    assert plot.locator(".tick").all_text_contents() != ticks
    page.locator("[aria-label='Whole plot']:visible").first.click()
    assert plot.locator(".point").evaluate_all(TRANSFORMS) == places
    point = plot.locator("a").last
    point.hover()
    assert "FVU" in page.inner_text("#tip")
    with page.expect_navigation():
        point.click()
    assert "/sae/" in page.url


TRANSFORMS = "(points) => points.map((point) => point.getAttribute('transform'))"


def test_examples_open(watched: Watched):
    page = watched.page
    watched.go(f"/sae/{SAE}/27")
    first = page.locator(".example-list details").first
    closed = first.inner_text()
    first.locator("summary").click()
    assert len(first.inner_text()) > len(closed)
    page.keyboard.press("e")
    assert page.locator(".example-list details[open]").count() == page.locator(".example-list details").count()
    page.locator(".t").first.hover()
    assert re.search(r"\d", page.inner_text("#tip"))
    page.click("label[for=logits-raw_]")
    assert page.locator(".tabbed:visible", has_text="no gains").count() == 1


def test_hostile_tokens_do_no_harm(watched: Watched, tmp_path: Path):
    page = watched.page
    first = len(vocabulary(is_hostile=False)) - 3
    for latent in range(first, len(vocabulary(is_hostile=True)) - 3):
        if latent % 20 == 19:
            continue
        watched.go(f"/sae/{SAE}/{latent}")
        assert page.evaluate("document.images.length + document.querySelectorAll('script:not([src^=\"/static/\"])').length") == 0
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.inner_text("main"))
        assert page.evaluate("[document.documentElement.scrollWidth <= innerWidth]") == [True]
    watched.go(f"/sae/{SAE}/{first}")
    assert SCRIPT in page.inner_text("aside")
    assert "49" not in page.inner_text("h1")
    watched.go(f"/sae/{SAE}/{first + 6}")
    screenshot(watched, tmp_path, "hostile")
    button = page.locator("aside .unfold").first
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert len(page.locator("aside .chip").first.inner_text()) > 9_000


def test_finding_latents(watched: Watched):
    page = watched.page
    watched.go(f"/sae/{SAE}/")
    page.fill("#token", "return")
    with page.expect_navigation():
        page.press("#token", "Enter")
    assert "return" in page.inner_text("table.latents")
    with page.expect_navigation():
        page.click("table.latents th a:text('Frequency')")
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Frequency")
    page.fill("#find", "import")
    with page.expect_navigation():
        page.press("#find", "Enter")
    assert "the token 'import'" in page.inner_text("main")


@pytest.mark.parametrize("watched", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_the_pages_still_tell_everything(watched: Watched):
    page = watched.page
    watched.go("/")
    page.click("label[for=heat-delta_loss]")
    assert page.locator(".tabbed:visible", has_text="Rise of").count() == 1
    watched.go(f"/sae/{SAE}/27")
    page.locator("summary").first.click()
    assert page.locator(".example-list details[open]").count() == 1
    page.click("#next")
    assert page.url.endswith("/28")
    watched.go(f"/text?sae={SAE}&text={TEXT}")
    page.locator(".reading .token").nth(3).click()
    assert page.locator(".pane:visible").count() == 1
