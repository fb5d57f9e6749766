"""A graph's page in a real browser: drawing, mouse, keyboard, phone, permalink, export; hostile graphs do no harm."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from browser.asking import FakeLive
from browser.invented_suite import Shape, write_invented_suite
from browser.test_pages import CHROMIUM, DESKTOP, PHONE, Watched, chromium, screenshot, watched
from invented_graph import SCRIPT, invented_graph

from everyscope.browse.app import Browser as Pages
from everyscope.browse.circuit_file import circuit_file
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen
from everyscope.circuits.circuit_tracer import from_json
from everyscope.circuits.files import ENDING, FOLDER
from everyscope.circuits.writing import write_graph

__all__ = ["chromium", "watched"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
SHAPE = Shape(kinds=("transcoder",), layers=2, widths=(64,), l0s=(5.2,), context=32, is_hostile=True)
FILE: list[str] = []
"""Address of the page as one file."""
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
    assert preparation.index is not None
    (folder / "page.html").write_text(circuit_file(preparation.index, "good", invented_graph(CODERS)), encoding="utf-8")
    server = uvicorn.Server(uvicorn.Config(Pages(preparation, FakeLive).app(), log_level="error", lifespan="off"))
    FILE[:] = [(folder / "page.html").as_uri()]
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
    assert watched.page.inner_text("#pinned h2") == "Strongest paths"


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
    assert watched.page.inner_text("#pinned h2") == "Strongest paths"
    watched.page.locator("#seek").fill("error: what")
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
    assert ">layer 1</text>" in text


@pytest.mark.parametrize(("button", "area"), [("#png", "#canvas"), ("#pins-png", "#subgraph")])
def test_export_as_png_is_a_picture_of_the_drawing(watched, tmp_path, button, area):
    opened(watched)
    with watched.page.expect_download() as download:
        watched.page.locator(button).click()
    download.value.save_as(tmp_path / "graph.png")
    raw = (tmp_path / "graph.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    sizes = watched.page.evaluate(
        "area => [...document.querySelectorAll(`${area} > svg`)].map((one) => [one.clientWidth, one.clientHeight])", area
    )
    width, height = (int.from_bytes(raw[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (2 * sum(one for one, _ in sizes), 2 * max(one for _, one in sizes))
    assert len(raw) > 20_000  # an empty picture of this size has about 5 kB


def pinned(watched: Watched) -> None:
    opened(watched)
    watched.page.locator("#pin-these").click()


def test_without_pins_the_strongest_paths_are_boxes(watched):
    opened(watched)
    boxes = count(watched, "#subgraph .unit")
    assert 5 < boxes < 20
    assert count(watched, "#subgraph .unit.error") == 0
    assert count(watched, "#subgraph .links path") > 3
    assert watched.page.locator("#ablation").is_hidden()
    watched.page.locator("#pin-these").click()
    assert count(watched, "#subgraph .unit") == boxes
    assert count(watched, ".canvas .node.pinned") == count(watched, "#pins .pin")


def test_pins_are_grouped_named_dragged_and_the_address_keeps_all(watched):
    pinned(watched)
    page, before = watched.page, count(watched, "#subgraph .unit")
    for place in (0, 1):
        page.locator("#pins input[type=checkbox]").nth(place).check()
    page.locator("#group").click()
    assert count(watched, "#subgraph .unit") == before - 1
    page.locator("#pins fieldset input[type=text]").fill("a:b <i>,~&group=")
    page.keyboard.press("Tab")
    box = page.locator("#subgraph .unit.group rect")
    start = box.bounding_box()
    page.mouse.move(start["x"] + 20, start["y"] + 20)
    page.mouse.down()
    page.mouse.move(start["x"] + 60, start["y"] + 90, steps=4)
    page.mouse.up()
    moved = box.bounding_box()
    assert (moved["x"] - start["x"], moved["y"] - start["y"]) == pytest.approx((40, 70), abs=2)
    unit = page.locator("#subgraph .unit.latent").first
    unit.focus()
    at = unit.locator("rect").bounding_box()
    page.keyboard.press("ArrowRight")
    assert unit.locator("rect").bounding_box()["x"] == pytest.approx(at["x"] + 12, abs=1)
    fragment = page.url[page.url.index("#") :]
    opened(watched, fragment=fragment)
    assert page.locator("#pins fieldset input[type=text]").input_value() == "a:b <i>,~&group="
    assert page.locator("#subgraph .unit.group text").first.text_content() == "a:b <i>,~&group="
    assert page.locator("#subgraph .unit.group rect").bounding_box()["x"] == pytest.approx(moved["x"], abs=2)
    page.locator("#pins fieldset button", has_text="Ungroup").click()
    assert count(watched, "#subgraph .unit") == before
    page.locator("#unpin").click()
    assert page.inner_text("#pinned h2") == "Strongest paths"


def test_circuit_tracers_json_takes_what_is_pinned_and_grouped(watched, tmp_path):
    pinned(watched)
    for place in (0, 1):
        watched.page.locator("#pins input[type=checkbox]").nth(place).check()
    watched.page.locator("#group").click()
    with watched.page.expect_download() as download:
        watched.page.locator("#foreign").click()
    download.value.save_as(tmp_path / "graph.json")
    graph = from_json(json.loads((tmp_path / "graph.json").read_text(encoding="utf-8")), "graph.json")
    assert len(graph.facts.pins) == count(watched, "#pins .pin")
    ((name, *members),) = graph.facts.groups
    assert name == "group 1"
    assert members == list(graph.facts.pins[:2])


def test_ablation_shows_measured_beside_predicted(watched):
    pinned(watched)
    page = watched.page
    latents = count(watched, "#subgraph .unit.latent")
    page.locator("#ablation input[name=attention]").check()
    page.locator("#ablation button").click()
    page.wait_for_selector("#ablated table")
    rows = page.locator("#ablated table").first.locator("tbody tr")
    assert rows.count() == latents + 1
    assert rows.first.inner_text().split() == ["all", "of", "them", f"−{latents}.00", f"−{latents / 2:.2f}"]
    assert "75.0 % → 50.0 %" in page.inner_text("#ablated .shift")
    assert count(watched, "#ablated script, #ablated b, #ablated img") == 0
    later = page.locator("#ablated table").nth(1).locator("tbody button").first
    assert "not drawn" in page.locator("#ablated table").nth(1).inner_text()
    name = later.inner_text()
    later.click()
    assert title(watched)[:20] == name[:20]
    rows.nth(1).locator("button").click()
    assert "chosen-row" in (rows.nth(1).get_attribute("class") or "")


def test_a_page_of_one_file_works_without_a_server(chromium, base):
    context = chromium.new_context(viewport=DESKTOP)
    page, wrong, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(FILE[0])
    page.wait_for_selector("#circuit[data-ready=yes]")
    page.locator("#inputs .entry", has_text="#").first.click()
    page.wait_for_selector("#chosen .more .chip")
    page.locator("#chosen button").click()
    assert page.inner_text("#pinned h2") == "Pinned (1)"
    assert page.locator("#ablation").is_hidden()
    with page.expect_download() as download:
        page.locator("#foreign").click()
    graph = from_json(json.loads(Path(download.value.path()).read_text(encoding="utf-8")), "graph.json")
    assert len(graph.facts.pins) == 1
    assert asked[:1] == FILE
    assert not [url for url in asked[1:] if not url.startswith("blob:")]
    assert not wrong
    context.close()


def test_a_prompt_is_drawn_from_the_form(watched):
    watched.page.set_default_timeout(60_000)
    watched.go("/circuits")
    watched.page.locator("main a", has_text="Draw a circuit").click()
    watched.page.locator("#prompt").fill("def first(items):")
    watched.page.locator("#position").fill("2")
    watched.page.keyboard.press("Enter")
    watched.page.wait_for_selector("#circuit[data-ready=yes]")
    assert "/circuit/def-first-items-" in watched.page.url


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
