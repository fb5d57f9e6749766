"""A graph's page in a real browser: drawing, mouse, keyboard, phone, permalink, export; hostile graphs do no harm."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from browser.invented_suite import Shape, write_invented_suite
from browser.test_pages import CHROMIUM, DESKTOP, PHONE, Watched, chromium, screenshot, watched
from invented_graph import SCRIPT, invented_graph

from everyscope.browse.app import Browser as Pages
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen
from everyscope.circuits.files import ENDING, FOLDER
from everyscope.circuits.writing import write_graph

__all__ = ["chromium", "watched"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
SHAPE = Shape(kinds=("transcoder",), layers=2, widths=(64,), l0s=(5.2,), context=32, is_hostile=True)
CODERS = [(f"transcoder/layer_{layer}/width_64/average_l0_5", 64) for layer in range(2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a hostile suite with two graphs; gives its address."""
    folder = tmp_path_factory.mktemp("circuit")
    suite = write_invented_suite(folder / "suite", SHAPE)
    write_graph(suite / FOLDER / f"good{ENDING}", invented_graph(CODERS))
    write_graph(suite / FOLDER / f"loose{ENDING}", invented_graph(CODERS, violation=0.02))
    preparation = Preparation(suite, folder / "cache")
    preparation.run()
    server = uvicorn.Server(uvicorn.Config(Pages(preparation, None).app(), log_level="error", lifespan="off"))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def opened(watched: Watched, name: str = "good", fragment: str = "") -> None:
    watched.page.set_default_timeout(60_000)
    watched.page.goto("about:blank")
    watched.go(f"/circuit/{name}{fragment}")
    watched.page.wait_for_selector("#circuit[data-ready=yes]")


def count(watched: Watched, selector: str) -> int:
    return watched.page.locator(selector).count()


def title(watched: Watched) -> str:
    return watched.page.inner_text("#chosen h2")


def test_the_likeliest_output_is_chosen_and_its_inputs_are_listed(watched, tmp_path):
    opened(watched)
    assert title(watched) == SCRIPT
    assert watched.page.locator("#inputs .entry").count() > 5
    assert count(watched, ".canvas .node.latent") > 5
    assert count(watched, ".canvas .links path") > 15
    assert count(watched, ".canvas .labels text") > 4
    assert "in sum" in watched.page.inner_text("#inputs")
    screenshot(watched, tmp_path, "circuit")


def test_mouse_pins_lists_lead_on_and_the_address_keeps_it(watched):
    opened(watched)
    watched.page.locator("#inputs .entry").nth(1).click()
    second = title(watched)
    assert second != SCRIPT
    watched.page.locator("#chosen button").click()
    assert watched.page.inner_text("#pinned h2") == "Pinned (1)"
    address = watched.page.url
    fragment = address[address.index("#") :]
    assert "pins=" in fragment
    opened(watched, fragment=fragment)
    assert title(watched) == second
    assert watched.page.inner_text("#pinned h2") == "Pinned (1)"
    watched.page.locator("#pinned .chip-button").click()
    watched.page.locator("#chosen button").click()
    assert watched.page.locator("#pinned").is_hidden()


def test_hovering_shows_a_card_for_a_while(watched):
    opened(watched)
    before = title(watched)
    watched.page.locator(".canvas .node.latent .reach").last.hover(force=True)
    watched.page.wait_for_function("before => document.querySelector('#chosen h2').textContent !== before", arg=before)
    watched.page.wait_for_selector("#chosen .more .chip")
    watched.page.mouse.move(5, 5)
    watched.page.wait_for_function("before => document.querySelector('#chosen h2').textContent === before", arg=before)


def test_sliders_take_nodes_and_edges_away(watched):
    opened(watched)
    nodes, links = count(watched, ".canvas .node"), count(watched, ".canvas .links path")
    watched.page.locator("#edges").fill("40")
    assert count(watched, ".canvas .links path") < links
    watched.page.locator("#nodes").fill("20")
    assert count(watched, ".canvas .node") < nodes
    assert watched.page.inner_text("#nodes-out") == "20%"
    assert count(watched, ".canvas .node.logit") == 2


def test_keyboard_walks_pins_and_searches(watched):
    opened(watched)
    watched.page.locator("#canvas").focus()
    watched.page.keyboard.press("ArrowDown")
    first = title(watched)
    assert first != SCRIPT
    watched.page.keyboard.press("Enter")
    assert watched.page.inner_text("#pinned h2") == "Pinned (1)"
    watched.page.keyboard.press("Escape")
    assert watched.page.locator("#pinned").is_hidden()
    watched.page.locator("#seek").fill("error of the")
    assert count(watched, ".canvas .found") == count(watched, ".canvas .node.error")
    watched.page.locator("#seek").fill("L0#")
    found = count(watched, ".canvas .found")
    assert 0 < found < count(watched, ".canvas .node")
    watched.page.keyboard.press("Enter")
    assert title(watched) != first


@pytest.mark.parametrize(
    "watched", [{"viewport": PHONE, "has_touch": True}, {"viewport": DESKTOP, "color_scheme": "dark"}], indirect=True
)
def test_phones_and_the_dark(watched, tmp_path):
    opened(watched)
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    screenshot(watched, tmp_path, f"circuit-{watched.page.viewport_size['width']}")


def test_export_as_svg_holds_the_drawing_and_nothing_else(watched, tmp_path):
    opened(watched)
    with watched.page.expect_download() as download:
        watched.page.locator("#svg").click()
    path = tmp_path / "graph.svg"
    download.value.save_as(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "<script" not in text
    assert text.count("<path") == count(watched, ".canvas .links path")
    assert 'stroke="rgb' in text


def test_a_graph_that_breaks_its_sums_says_so_in_red(watched):
    opened(watched, "loose")
    alert = watched.page.locator("#violation")
    assert "breaks its own sums" in alert.inner_text()
    red, green, blue = (int(part) for part in alert.evaluate("node => getComputedStyle(node).color").strip("rgb()").split(","))
    assert red > 2 * max(green, blue)


def test_hostile_graphs_stay_text(watched):
    opened(watched)
    assert count(watched, "#circuit script, #circuit img") == 0
    assert Path(watched.page.url.split("#")[0]).name == "good"
    watched.go("/circuits")
    assert count(watched, "main script, main img") == 0
