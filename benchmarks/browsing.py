"""How long the pages of a suite take while its language model steers: three tabs that read, and one that never stops asking.

    python benchmarks/browsing.py runs/tiny             a finished run, or its suite
    python benchmarks/browsing.py runs/tiny --quick     some seconds, to see that it runs

It starts a server of its own. Each tab asks for another page as soon as somebody has looked at the last one: the suite, an SAE, a
latent, a search. Rounds without and with steering take turns. At first a page of another site asks for a steering: it gets 403,
and no model is loaded. The table shows each tab, then each kind of page; `results.json` lies in `--out`. What else runs on the
machine counts: its load is printed beside the numbers.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from everyscope.suite.reader import Suite, load_suite

TABS = 3
LOOK_SECONDS = (0.05, 0.3)
"""How long somebody looks at a page, at random between the two [s]."""
PROMPT, TOKENS = "def f(x):", 200
"""Continued with and without a latent, by so many tokens each, which is the most that a page asks for [tokens]."""
FOREIGN = {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}


@dataclass(frozen=True)
class Visit:
    """One page that somebody waited for."""

    is_steering: bool
    """Whether the model worked meanwhile."""
    tab: int
    kind: str
    seconds: float


class Server:
    """The pages, as `everyscope browse` serves them."""

    def __init__(self, folder: Path, cache: Path) -> None:
        """Start it; `wait` until the index is there."""
        flags = ["--port", "0", "--no-open", "--cache", str(cache)]
        command = [sys.executable, "-m", "everyscope", "browse", str(folder), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().rpartition(" ")[2].rstrip("/")
        while not self.state()["is_ready"]:
            time.sleep(0.1)

    def get(self, path: str, headers: dict[str, str] | None = None) -> float:
        """The seconds that an address takes, to its last byte; raises HTTPError for a status that is no success."""
        start = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers or {})) as answer:
            answer.read()
        return time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """How far index and model are."""
        with urllib.request.urlopen(f"{self.address}/state") as answer:
            return json.loads(answer.read())


@contextmanager
def serving(folder: Path, cache: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(folder, cache)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


def steering() -> str:
    """The address that continues the prompt."""
    return f"/steer?prompt={quote(PROMPT)}&tokens={TOKENS}&latent=3&strength=2"


def refuse_strangers(server: Server) -> None:
    """See that a page of another site gets 403, and that no model was loaded for it."""
    status = 200
    try:
        server.get(steering(), FOREIGN)
    except urllib.error.HTTPError as error:
        status = error.code
    assert (status, server.state()["model"]) == (403, "asleep"), (status, server.state())


def page(random_: random.Random, suite: Suite) -> tuple[str, str]:
    """Some page: its kind and its address."""
    record = random_.choice(suite.index.saes)
    latent = random_.randrange(record.width)
    pages = {
        "suite": "/",
        "SAE": f"/sae/{record.folder}/",
        "latent": f"/sae/{record.folder}/{latent}",
        "search": "/search?q=return",
    }
    return random_.choice(list(pages.items()))


def visit(server: Server, suite: Suite, seconds: float, is_steering: bool, seed: int) -> tuple[list[Visit], int]:
    """Let all tabs read for a while; their visits, and how many times the model has steered meanwhile."""
    visits: list[Visit] = []
    end, num_steered = time.monotonic() + seconds, 0

    def read(tab: int) -> None:
        random_ = random.Random(seed * TABS + tab)
        while time.monotonic() < end:
            kind, address = page(random_, suite)
            visits.append(Visit(is_steering, tab, kind, server.get(address)))
            time.sleep(random_.uniform(*LOOK_SECONDS))

    def steer() -> None:
        nonlocal num_steered
        while time.monotonic() < end:
            server.get(steering())
            num_steered += 1

    threads = [threading.Thread(target=read, args=(tab,)) for tab in range(TABS)]
    threads += [threading.Thread(target=steer)] * is_steering
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return visits, num_steered


def row_of(seconds: Sequence[float]) -> dict[str, float]:
    """Figures of some waits [ms]."""
    ordered = sorted(1000 * value for value in seconds)
    return {
        "pages": len(ordered),
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def tables(visits: Sequence[Visit]) -> list[dict[str, Any]]:
    """A row for each tab and each kind of page, without and with steering, and one for all."""
    rows = []
    for is_steering in (False, True):
        ours = [one for one in visits if one.is_steering == is_steering]
        groups = {"all": ours}
        groups |= {f"tab {tab + 1}": [one for one in ours if one.tab == tab] for tab in range(TABS)}
        groups |= {kind: [one for one in ours if one.kind == kind] for kind in sorted({one.kind for one in ours})}
        rows += [
            {"steering": is_steering, "what": name} | row_of([one.seconds for one in group])
            for name, group in groups.items()
            if group
        ]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run, or its suite")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "browsing")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1.0, 1
    folder = options.folder / "suite" if (options.folder / "suite").is_dir() else options.folder
    suite, visits, num_steered = load_suite(folder), [], 0
    options.out.mkdir(parents=True, exist_ok=True)
    with serving(folder, options.out / "index") as server:
        refuse_strangers(server)
        server.get(steering())  # loads the model
        load = os.getloadavg()[0]
        for number in range(options.rounds):
            for is_steering in (False, True):
                found, steered = visit(server, suite, options.seconds, is_steering, number)
                visits, num_steered = visits + found, num_steered + steered
    rows = tables(visits)
    title = f"{suite.index.title}: {num_steered} steers of {2 * TOKENS} tokens; load {load:.1f} before, {os.cpu_count()} cores"
    table = Table("steering", "what", "pages", "p50 [ms]", "p95 [ms]", "max [ms]", title=title)
    for row in rows:
        figures = [f"{row[name]:.0f}" for name in ("p50", "p95", "max")]
        table.add_row("yes" if row["steering"] else "no", row["what"], str(row["pages"]), *figures)
    Console().print(table)
    results = {"command": sys.argv, "load": load, "cores": os.cpu_count(), "steered": num_steered, "rows": rows}
    results["visits"] = [asdict(one) for one in visits]
    (options.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
