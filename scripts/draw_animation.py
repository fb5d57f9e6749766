"""The pictures that README and index show: the pages of a suite in a browser, from a text to a steered model.

    python scripts/draw_animation.py runs/tiny --latent 163

It serves the pages in a thread, takes pictures with a Chromium that is installed (EVERYSCOPE_CHROMIUM names it where it is not
called chromium), and writes docs/images/text_to_steering.webp, some ten seconds, and docs/images/latent.png.
"""

import argparse
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import matplotlib as mpl
import uvicorn
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from everyscope.browse.app import Browser
from everyscope.browse.live_model import SuiteModel
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen
from everyscope.sites.config import ModelConfig

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = Path(__file__).parents[1] / "docs/images"
PROMPT = "def close(self, name):\n    if name is None:\n       "
SIZE = (960, 600)
"""Of the pages [pixels]."""
CAPTION = 56
"""Height of the strip below them [pixels]."""
FONT = Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
CHROMIUM = os.environ.get("EVERYSCOPE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served(suite: Path, cache: Path | None) -> Iterator[str]:
    """The address of a suite's pages, while the block runs."""
    preparation = Preparation(suite, cache)
    preparation.run()
    app = Browser(preparation, lambda: SuiteModel(suite, ModelConfig(name="tiny"))).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def captioned(png: bytes, caption: str) -> Image.Image:
    """A picture with a line of text below it."""
    picture = Image.new("RGB", (SIZE[0], SIZE[1] + CAPTION), "#1b2333")
    picture.paste(Image.open(BytesIO(png)).convert("RGB"), (0, 0))
    draw = ImageDraw.Draw(picture)
    draw.text((24, SIZE[1] + CAPTION / 2), caption, fill="white", font=ImageFont.truetype(str(FONT), 22), anchor="lm")
    return picture


def frames(page: "Page", base: str, sae: str, latent: int) -> Iterator[tuple[Image.Image, int]]:
    """Every picture of the animation and how long it stays [ms]."""

    def shot(address: str, top: str | None, caption: str, milliseconds: int) -> tuple[Image.Image, int]:
        page.goto(base + address, wait_until="networkidle", timeout=120_000)
        if top is not None:
            page.evaluate("(top) => scrollTo(0, document.querySelector(top).getBoundingClientRect().top + scrollY - 70)", top)
        page.wait_for_timeout(500)
        return captioned(page.screenshot(), caption), milliseconds

    text = f"/text?sae={sae}&text={quote(PROMPT)}"
    yield shot(text, None, "A text of yours, read through one SAE", 2000)
    last = page.locator("a.token").count() - 1
    yield shot(f"{text}#token-{last}", "#tokens-title", "A token, and the latents that are active on it", 2500)
    yield shot(f"/sae/{sae}/{latent}", None, "A latent: where it fires, its label, and how well the label predicts", 2500)
    steer = f"/steer?prompt={quote(PROMPT)}&sae={sae}&latent={latent}&strength=1&tokens=16&temperature=0"
    yield shot(steer, "textarea", "What the model writes, and what it writes with this latent pushed", 3500)


def main() -> None:
    """Take the pictures and write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a run's folder that holds suite/")
    parser.add_argument("--sae", default="resid_post/layer_3/width_1k/average_l0_27")
    parser.add_argument("--latent", type=int, default=163, help="one that is active on the last token of the prompt")
    parser.add_argument("--best", default="attn_out/layer_2/width_1k/average_l0_27/46", help="the latent of latent.png")
    parser.add_argument("--cache", type=Path, help="folder of the pages' index (default: the user's cache folder)")
    options = parser.parse_args()
    with served(options.run / "suite", options.cache) as base, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, locale="en")
        pictures, times = zip(*frames(page, base, options.sae, options.latent), strict=True)
        page.set_viewport_size({"width": 1200, "height": 900})
        page.goto(f"{base}/sae/{options.best}", wait_until="networkidle")
        page.screenshot(path=IMAGES / "latent.png")
        browser.close()
    pictures[0].save(
        IMAGES / "text_to_steering.webp",
        save_all=True,
        append_images=pictures[1:],
        duration=list(times),
        loop=0,
        quality=92,
        method=6,
    )


if __name__ == "__main__":
    main()
