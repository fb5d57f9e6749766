"""How long the first pages of a published suite take, from the command to the last byte, with nothing in the cache.

    python benchmarks/first_page.py runs/tiny                   a finished run, or its suite
    python benchmarks/first_page.py --latents 1000000           an invented suite of so many latents
    python benchmarks/first_page.py --latents 54000000          as many as 822 SAEs of 64k have
    python benchmarks/first_page.py runs/tiny --whole           waits for the whole index, too

An invented suite is one SAE of up to 131,072 latents, written once, and links to its files under the names of all others. Each
round starts a server with an empty cache and asks for the first page, a latent of the last SAE, and a search. Seconds are by
the clock, and of the processor, the server's and those of its helpers: on a busy machine only the latter can be compared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from everyscope.base.files import write_json
from everyscope.base.ids import IDENTITY, content_id
from everyscope.sites.names import Site
from everyscope.suite.layout import sae_folder
from everyscope.suite.reader import load_suite

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from invented_suite import Shape, SuiteShape, write_suite

WIDEST = 131_072
"""Latents of an SAE of an invented suite, at most [latents]."""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Answer:
    """One page that somebody waited for."""

    page: str
    seconds: float
    """By the clock, from the command for the first page, else from the request [s]."""
    cpu_seconds: float
    """Of the server and its helpers, meanwhile [s]."""
    num_bytes: int


def invented(folder: Path, num_latents: int) -> Path:
    """A suite of `num_latents`, or a few more, in SAEs of one width."""
    width = min(WIDEST, num_latents) if num_latents < 1 << 22 else 1 << 16
    count = -(-num_latents // width)
    suite = folder / f"invented_{count}x{width}"
    if suite.exists():
        return suite
    partial = folder / f"{suite.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_suite(partial, SuiteShape((Shape(Site("resid_post", 0), width, 50.0),), blocks=64, context=128))
    content = json.loads((partial / "suite.json").read_text())
    (first,) = content["saes"]
    for number in range(1, count):
        site, l0 = Site("resid_post", number // 8), 50 + 10 * (number % 8)
        record = {**first, "folder": sae_folder(site, width, l0), "layer": site.layer, "name": f"sae_{number}"}
        record["metrics"] = {**first["metrics"], "l0": l0, "is_canonical": number % 8 == 0}
        content["saes"].append(record)
        (partial / record["folder"]).mkdir(parents=True)
        for file in (partial / first["folder"]).iterdir():
            os.link(file, partial / record["folder"] / file.name)
    content.pop(IDENTITY)
    write_json(partial / "suite.json", {**content, IDENTITY: content_id(content)})
    return partial.rename(suite)


class Server:
    """The pages, as `everyscope browse` serves them."""

    def __init__(self, suite: Path, cache: Path) -> None:
        """Start it with nothing in `cache`."""
        self.start = time.perf_counter()
        flags = ["--port", "0", "--no-open", "--cache", str(cache)]
        command = [sys.executable, "-m", "everyscope", "browse", str(suite), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().rpartition(" ")[2].rstrip("/")

    def cpu(self) -> float:
        """Seconds of the processor so far, of the server and of helpers that have ended."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICK

    def get(self, page: str, path: str, start: float | None = None, cpu: float | None = None) -> Answer:
        """Ask until the page is there: one that is still being indexed says so with 503."""
        start = time.perf_counter() if start is None else start
        cpu = self.cpu() if cpu is None else cpu
        while True:
            try:
                with urllib.request.urlopen(self.address + path) as answer:
                    content = answer.read()
                return Answer(page, time.perf_counter() - start, self.cpu() - cpu, len(content))
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(0.1)

    def whole(self) -> Answer:
        """Wait for the whole index."""
        while not json.loads(urllib.request.urlopen(f"{self.address}/state").read())["is_ready"]:
            time.sleep(0.1)
        return Answer("whole index", time.perf_counter() - self.start, self.cpu(), 0)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


def round_of(suite: Path, is_whole: bool) -> list[Answer]:
    """Every page once, by a server of its own."""
    last = load_suite(suite).index.saes[-1]
    with tempfile.TemporaryDirectory() as cache:
        server = Server(suite, Path(cache))
        try:
            answers = [
                server.get("first page", "/", server.start, 0.0),
                server.get("a latent of the last SAE", f"/sae/{last.folder}/{last.width // 2}"),
                server.get("the last SAE", f"/sae/{last.folder}/"),
                server.get("a search", "/search?q=return"),
            ]
            return [*answers, server.whole()] if is_whole else answers
        finally:
            server.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a finished run, or its suite")
    parser.add_argument("--latents", type=int, help="of an invented suite in its place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="wait for the whole index")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "first_page")
    options = parser.parse_args()
    if (options.folder is None) == (options.latents is None):
        parser.error("give a suite, or --latents of an invented one")
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.folder or invented(options.out, options.latents)
    suite = folder / "suite" if (folder / "suite").is_dir() else folder
    saes = load_suite(suite).index.saes
    load = os.getloadavg()[0]
    rounds = [round_of(suite, options.whole) for _ in range(options.rounds)]
    title = f"{sum(sae.width for sae in saes):,} latents in {len(saes)} SAEs; load {load:.1f}, {os.cpu_count()} cores"
    table = Table("page", "clock, median [s]", "worst [s]", "processor, median [s]", "KiB", title=title)
    for found in zip(*rounds, strict=True):
        seconds, cpu = [answer.seconds for answer in found], statistics.median(answer.cpu_seconds for answer in found)
        row = (f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", f"{cpu:.2f}", f"{found[0].num_bytes / 1024:.0f}")
        table.add_row(found[0].page, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
