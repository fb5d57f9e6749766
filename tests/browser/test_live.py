"""What asks the language model, in a real browser: by mouse, keyboard and phone, streamed, stopped, pinned, and gone back to."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from browser.asking import FakeLive
from browser.invented_suite import SCRIPT, write_invented_suite
from browser.test_pages import AXE, CHROMIUM, DESKTOP, PHONE, SAE, SHAPE, Watched, chromium, playwright, screenshot, watched
from transcoder_suite import write_transcoder_suite

from everyscope.browse.app import Browser as Pages
from everyscope.browse.live import Stopped
from everyscope.browse.live_model import SuiteModel
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model

__all__ = ["chromium", "watched"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
TOUCH = {"viewport": PHONE, "has_touch": True}
STACK = "layers/resid_post/256"
WORDS = "one two three four five six seven"


class Paced(FakeLive):
    """Writes as slowly as it is told, and counts what it has written and whether it was stopped."""

    pause, num_written, num_stopped = 0.0, 0, 0

    def write(self, prompt, columns, *, num_tokens, temperature, seed, each=lambda step: None, stop=lambda: False):
        def paced(step):
            if stop():
                self.num_stopped += 1
                raise Stopped("stopped")
            time.sleep(self.pause)
            self.num_written += 1
            each(step)

        return super().write(prompt, columns, num_tokens=num_tokens, temperature=temperature, seed=seed, each=paced)


@pytest.fixture(scope="module")
def model() -> Paced:
    return Paced()


def serve(suite: Path, cache: Path, live) -> Iterator[str]:
    preparation = Preparation(suite, cache)
    preparation.run()
    server = uvicorn.Server(uvicorn.Config(Pages(preparation, live).app(), log_level="error", lifespan="off"))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: Paced) -> Iterator[str]:
    """A server of a hostile suite with a model that is none; gives its address."""
    folder = tmp_path_factory.mktemp("live")
    yield from serve(write_invented_suite(folder / "suite", SHAPE), folder / "cache", lambda: model)


def read(watched: Watched, text: str, sae: str) -> None:
    watched.go("/text")
    watched.page.fill("#text", text)
    watched.page.select_option("#sae", sae)
    watched.page.check("[name=dense]")
    watched.page.click("button.main")
    watched.page.wait_for_selector(".reading.scripted")


def shown(watched: Watched) -> str:
    """The head of the pane that is seen."""
    return watched.page.locator(".pane:visible h3").inner_text()


def eventually(watched: Watched, holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        watched.page.wait_for_timeout(20)
    assert holds()


def test_reading_a_text_and_going_back(watched: Watched, tmp_path: Path):
    page = watched.page
    read(watched, f"if {SCRIPT}:\n\treturn  x", SAE)
    assert SCRIPT in page.inner_text(".stream")
    assert "text=if" in page.url
    first = page.url
    page.fill("#text", "another text")
    page.click("button.main")
    playwright.expect(page.locator(".stream")).to_contain_text("another")
    page.go_back()
    playwright.expect(page.locator(".stream")).to_contain_text(SCRIPT)
    assert page.url == first
    assert page.input_value("#text").startswith("if ")
    page.wait_for_load_state("load")  # the page is loaded again: until its script runs, nobody hears of going on
    page.go_forward()
    playwright.expect(page.locator(".stream")).to_contain_text("another")
    screenshot(watched, tmp_path, "reading")


def test_a_token_that_is_clicked_stays_until_it_is_let_go(watched: Watched):
    page = watched.page
    read(watched, WORDS, SAE)
    tokens = page.locator(".reading .token")
    tokens.nth(3).hover()
    assert shown(watched).startswith("token 3")
    tokens.nth(5).hover()
    assert shown(watched).startswith("token 5")  # nothing is pinned: pointing previews
    tokens.nth(4).click()
    tokens.nth(6).hover()
    page.locator(".pane:visible").hover()
    assert shown(watched).startswith("token 4")
    assert page.url.endswith("#token-4")
    page.keyboard.press("Escape")
    assert page.locator(".pane:visible").count() == 0
    assert "#" not in page.url
    tokens.nth(2).click()
    tokens.nth(2).click()
    assert page.locator(".pane.shown, .pinned").count() == 0
    tokens.nth(6).focus()
    page.keyboard.press("Enter")
    page.mouse.move(5, 5)
    assert shown(watched).startswith("token 6")
    page.reload()
    page.wait_for_selector(".scripted")
    assert shown(watched).startswith("token 6")
    page.locator(".pane:visible .free").click()
    assert page.locator(".pane:visible").count() == 0


def test_all_layers_by_mouse_and_keyboard(watched: Watched, tmp_path: Path):
    page = watched.page
    read(watched, WORDS, STACK)
    assert page.locator(".matrix tbody th").all_inner_texts() == ["1", "0"]
    cell = page.locator('.matrix [value="5.1"]')
    cell.hover()
    assert re.search(r"% of its maximum", page.inner_text("#tip"))
    cell.click()
    page.wait_for_selector("#pane.pane")
    assert shown(watched).startswith("token 5")
    assert page.locator("#pane h4").all_inner_texts() == ["layer 1"]
    assert page.url.endswith("at=5.1")
    page.locator('.matrix [value="7.0"]').hover()
    assert shown(watched).startswith("token 5")
    screenshot(watched, tmp_path, "layers")
    page.locator("#pane .link").click()
    playwright.expect(page.locator("#pane h4")).to_have_text(["layer 1", "layer 0"])
    page.reload()
    playwright.expect(page.locator("#pane h4")).to_have_text(["layer 1", "layer 0"])
    page.keyboard.press("Escape")
    assert page.locator("#pane.pane").count() == 0
    assert "at=" not in page.url
    page.locator(".matrix thead button").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.value") == "4.1"
    assert page.locator(".matrix [tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#pane h3")).to_contain_text("token 4")
    page.keyboard.press("Enter")  # a second time lets it go
    playwright.expect(page.locator("#pane.pane")).to_have_count(0)
    numbers = page.locator(".read-latents tbody td:last-child").evaluate_all(
        "(cells) => cells.map((cell) => Number(cell.dataset.key))"
    )
    page.click(".read-latents th:last-child button")
    after = page.locator(".read-latents tbody td:last-child").evaluate_all(
        "(cells) => cells.map((cell) => Number(cell.dataset.key))"
    )
    assert after == sorted(numbers)
    assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("watched", [TOUCH], indirect=True)
def test_all_layers_on_a_phone(watched: Watched, tmp_path: Path):
    page = watched.page
    read(watched, WORDS, STACK)
    assert not page.is_visible(".hint-pane")  # it would lie over the text
    page.locator('.matrix [value="2.1"]').tap()
    page.wait_for_selector("#pane.pane")
    width, inside = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inside
    assert page.locator("#pane").bounding_box()["width"] <= inside
    cell, pane = page.locator('.matrix [value="2.1"]').bounding_box(), page.locator("#pane").bounding_box()
    assert cell["y"] + cell["height"] <= pane["y"] < page.evaluate("innerHeight")  # both are seen
    screenshot(watched, tmp_path, "layers_phone")
    page.locator("#pane .free").tap()
    assert page.locator("#pane.pane").count() == 0


def test_a_stream_grows_and_stop_ends_the_work(watched: Watched, model: Paced, tmp_path: Path):
    page = watched.page
    watched.go(f"/steer?sae={SAE}&latent=27")
    page.fill("#prompt", "def")
    page.fill("#tokens", "150")
    model.pause, model.num_written, model.num_stopped = 0.03, 0, 0
    page.click("button.main")
    page.wait_for_selector(".written")
    card = page.locator(".written .card").first
    before = len(card.inner_text())
    eventually(watched, lambda: len(card.inner_text()) > before)
    playwright.expect(page.locator(".what")).to_contain_text(re.compile(r"\d+ tokens, [\d.]+/s"))
    assert "<i>pushed</i>" in page.inner_text(".steered")
    screenshot(watched, tmp_path, "streaming")
    page.click(".stop")
    eventually(watched, lambda: model.num_stopped == 1)
    assert model.num_written < 150
    playwright.expect(page.locator("#result .note")).to_contain_text("Stopped after")
    count = int(re.search(r"tokens=(\d+)", page.url)[1])
    assert page.inner_text("#result .note") == f"Stopped after {count} tokens."
    text = card.inner_text()
    assert f"word{count - 1}" in text
    assert f"word{count}" not in text
    model.pause = 0.0
    page.click("button.main")
    playwright.expect(page.locator("#result mark").first).to_be_visible()  # a second try works
    assert "KL" in page.inner_text(".steered .judged")


def test_leaving_the_page_ends_the_work(watched: Watched, model: Paced):
    page = watched.page
    watched.go(f"/steer?sae={SAE}&latent=27")
    page.fill("#tokens", "150")
    model.pause, model.num_written, model.num_stopped = 0.05, 0, 0
    page.click("button.main")
    page.wait_for_selector(".written")
    page.goto(f"{watched.base}/")
    eventually(watched, lambda: model.num_stopped == 1)
    assert model.num_written < 150
    model.pause = 0.0


def test_what_was_streamed_is_what_its_address_shows(watched: Watched):
    page = watched.page
    watched.go(f"/steer?sae={SAE}&latent=27")
    page.fill("#prompt", "def")
    page.click("[name=sweep]")
    page.wait_for_selector("#written-title")
    assert page.locator(".written h3").all_inner_texts() == ["−0.5×", "as it is", "+0.25×", "+0.5×", "+1×"]
    assert page.locator(".judged dt", has_text="KL").count() == 4
    streamed, address = page.inner_text(".written"), page.url
    assert "sweep=1" in address
    assert "repeats itself" in streamed  # the fake writes one word over and over
    page.goto("about:blank")
    page.goto(address)
    assert page.inner_text(".written") == streamed


def test_latents_are_named_added_and_removed(watched: Watched):
    page = watched.page
    watched.go("/steer")
    page.select_option("#sae-1", SAE)
    page.fill("#latent-1", "27")
    playwright.expect(page.locator(".caption").first).to_contain_text("27")
    playwright.expect(page.locator(".caption a").first).to_have_attribute("href", f"/sae/{SAE}/27")
    page.fill("#latent-1", "9999")
    playwright.expect(page.locator(".caption").first).to_contain_text("expected a number")
    page.fill("#latent-1", "27")
    assert not page.is_visible(".remove")
    page.click(".add")
    assert page.evaluate("document.activeElement.id") == "latent-2"
    assert page.input_value("#sae-2") == SAE
    page.keyboard.type("28")
    playwright.expect(page.locator(".caption").nth(1)).to_contain_text("28")
    for _ in range(2):
        page.click(".add")
    assert not page.is_visible(".add")
    page.locator(".remove").first.click()
    assert page.locator(".push").count() == 3
    assert page.input_value("#latent-1") == "28"
    page.click("button.main")
    page.wait_for_selector("#written-title")
    assert page.url.count("latent=") == 3
    page.fill("#latent-1", "9999")
    page.click("button.main")
    playwright.expect(page.locator("#result")).to_contain_text("expected a number")
    watched.wrong[:] = [entry for entry in watched.wrong if "422" not in entry]  # the browser notes the refusals


def test_the_slider_and_the_number_are_one(watched: Watched):
    page = watched.page
    watched.go(f"/steer?sae={SAE}&latent=27&strength=0.5")
    slider = page.locator(".slider")
    assert slider.input_value() == "2"
    for place, strength in (
        ("-4", "-2"),
        ("-3", "-1"),
        ("-1", "-0.25"),
        ("0", "0"),
        ("0.5", "0.13"),
        ("1", "0.25"),
        ("3", "1"),
        ("4", "2"),
    ):
        slider.fill(place)
        assert float(page.input_value("#strength-1")) == pytest.approx(float(strength), abs=0.006)
    for strength, place in (("-0.5", "-2"), ("0.125", "0.5"), ("7", "4"), ("0", "0")):
        page.fill("#strength-1", strength)
        assert slider.input_value() == place
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#strength-1")) > 0
    assert "times its highest activation" in (slider.get_attribute("aria-valuetext") or "")


def test_a_text_is_tried_on_a_latent(watched: Watched, tmp_path: Path):
    page = watched.page
    watched.go(f"/sae/{SAE}/4")
    page.fill("#try-text", WORDS)
    page.press("#try-text", "Enter")
    page.wait_for_selector(".tried-line")
    assert page.locator(".tried-line .t").count() == 2
    assert page.locator("#how-strongly .tried").count() == 2
    assert "/try?text=one" in page.url
    token = page.locator(".tried-line .t").first
    token.hover()
    assert page.locator("#how-strongly .pointed").count() == 1
    page.mouse.move(5, 5)
    assert page.locator("#how-strongly .pointed").count() == 0
    screenshot(watched, tmp_path, "tried")
    page.reload()
    assert page.locator("#how-strongly .tried").count() == 2
    watched.go("/steer")
    assert page.input_value("#prompt") == WORDS  # a text follows from page to page


def test_an_example_is_tried_and_steered_from(watched: Watched, model: Paced):
    page = watched.page
    watched.go(f"/sae/{SAE}/27")
    row = page.locator(".example-list li").nth(1)
    row.hover()
    row.locator(".tools button", has_text="try").click()
    page.wait_for_selector(".tried-line")
    assert page.input_value("#try-text") == row.get_attribute("data-text")
    page.mouse.move(5, 5)
    assert page.locator(".tools").count() == 0
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".tools")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "steer from here"
    text, upto = row.get_attribute("data-text"), int(row.get_attribute("data-upto"))
    page.keyboard.press("Enter")
    page.wait_for_selector("#written-title")
    assert page.input_value("#prompt") == text[:upto]
    assert page.input_value("#latent-1") == "27"
    assert model.written[-1][0] == text[:upto]
    assert "start=" not in page.url


def test_a_circuit_and_a_steering_begin_at_a_token(watched: Watched, model: Paced):
    page = watched.page
    read(watched, WORDS, STACK)
    page.locator('.matrix [value="5.1"]').click()
    page.wait_for_selector("#pane.pane")
    page.locator("#pane .active .from-here").first.click()
    page.wait_for_selector("#written-title")
    assert model.written[-1][0] == "one two three four five"
    read(watched, WORDS, STACK)
    page.locator('.matrix [value="5.1"]').click()
    page.wait_for_selector("#pane.pane")
    page.get_by_text("What wrote this?").click()
    page.wait_for_url("**/circuit/*")
    eventually(watched, lambda: bool(model.drawn))
    assert (model.drawn[-1].prompt, model.drawn[-1].position) == ("one two three four five", 5)


@pytest.mark.parametrize("watched", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_the_same_forms_work(watched: Watched):
    page = watched.page
    watched.go("/text")
    page.fill("#text", WORDS)
    page.select_option("#sae", STACK)
    page.check("[name=dense]")
    page.click("button.main")
    page.locator('.matrix [value="5.1"]').click()
    assert page.locator("#pane h4").all_inner_texts() == ["layer 1"]
    watched.go(f"/steer?sae={SAE}&latent=27")
    page.click("[name=sweep]")
    assert page.locator(".written .card").count() == 5
    watched.go(f"/sae/{SAE}/4")
    page.fill("#try-text", WORDS)
    page.locator("#trier button.main").click()
    assert page.locator(".tried-line .t").count() == 2


VIOLATIONS = "async () => (await axe.run()).violations.flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html}`))"
LIGHTS = {
    f"{name} {scheme}": {"viewport": size, "has_touch": name == "phone", "color_scheme": scheme, "bypass_csp": True}
    for name, size in (("desktop", DESKTOP), ("phone", PHONE))
    for scheme in ("light", "dark")
}


@pytest.mark.skipif(not AXE, reason="EVERYSCOPE_AXE names no axe.min.js")
@pytest.mark.parametrize("watched", list(LIGHTS.values()), indirect=True, ids=list(LIGHTS))
def test_axe_finds_nothing(watched: Watched):
    source = Path(AXE).read_text(encoding="utf-8")
    page, found = watched.page, []
    for address in (
        f"/text?sae={STACK}&text={WORDS}&dense=show&at=5",
        f"/text?sae={SAE}&text={WORDS}&dense=show#token-5",
        f"/steer?sae={SAE}&latent=27&prompt=def&sweep=1",
        f"/sae/{SAE}/4/try?text={WORDS}",
    ):
        watched.go(address)
        page.evaluate(source)
        found += [f"{address}: {entry}" for entry in page.evaluate(VIOLATIONS)]
    assert not found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of random transcoders of the bundled model, which really reads and writes; gives its address."""
    config: Any = load_language_model("tiny").model.config
    d_model = config.hidden_size
    draw, before = torch.Generator().manual_seed(0), torch.get_num_threads()

    def coder() -> Sae:
        w_enc, w_dec = (torch.randn(*size, generator=draw) / d_model**0.5 for size in ((d_model, 64), (64, d_model)))
        metadata = SaeMetadata(kind="transcoder")
        return Sae(w_enc, w_dec, torch.zeros(64), torch.zeros(d_model), torch.full((64,), 0.1), metadata=metadata)

    folder = tmp_path_factory.mktemp("tiny")
    suite = write_transcoder_suite(folder / "suite", "tiny", {layer: coder() for layer in range(4)})
    yield from serve(suite, folder / "cache", lambda: SuiteModel(suite, ModelConfig(name="tiny")))
    torch.set_num_threads(before)


def test_a_stranger_gets_from_a_sentence_to_a_steered_continuation(chromium, tiny: str):
    """In fewer than eight clicks and less than a minute of waiting, the model's loading included."""
    page, clicks, waited = chromium.new_context(viewport=DESKTOP).new_page(), 0, 0.0
    page.set_default_timeout(60_000)

    def click(selector: str, then: str) -> None:
        nonlocal clicks, waited
        clicks += 1
        begin = time.monotonic()
        page.locator(selector).first.click()
        page.wait_for_selector(then)
        waited += time.monotonic() - begin

    page.goto(tiny)
    click("nav a:text-is('Text')", "#text")
    page.fill("#text", "def area(width, height):\n    return width *")
    click("button.main", ".matrix td button")
    click(".matrix thead button >> nth=-1", "#pane .named")  # the last token, through all layers
    explaining = page.locator("#pane .named").first.get_attribute("href")
    click("#pane .named", ".latent-body")
    assert page.url.endswith(explaining)
    click(".links a:text('steer')", "#steerer .caption a")
    assert page.input_value("#prompt").startswith("def area(width")
    click("button.main", "#written-title")
    assert page.locator(".written .card").count() == 2
    assert len(page.inner_text(".steered .text")) > len("def area(width, height):\n    return width *")
    page.context.close()
    assert clicks < 8
    assert waited < 60
