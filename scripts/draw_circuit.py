"""The picture of a circuit that the README shows: a graph's page, as one file, in a browser.

    everyscope circuit runs/tiny/suite "def first(items):
        return items[" --export circuit.html
    python scripts/draw_circuit.py circuit.html

Writes docs/images/circuit.png with a Chromium that is installed (EVERYSCOPE_CHROMIUM names it where it is not called chromium).
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs/images/circuit.png"
CHROMIUM = os.environ.get("EVERYSCOPE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH, HEIGHT = 1280, 1380
"""Of the picture: down to the boxes of the strongest paths [pixels]."""


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what --export wrote")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(options.page.resolve().as_uri())
        page.wait_for_selector("#circuit[data-ready=yes]")
        page.screenshot(path=options.out)
        browser.close()
    print(options.out)


if __name__ == "__main__":
    main()
