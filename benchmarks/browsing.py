"""How long the pages of a suite take: those that ask its language model, and the others while it steers.

    python benchmarks/browsing.py runs/tiny             a finished run, or its suite
    python benchmarks/browsing.py runs/tiny --busy 1    beside a program that keeps one core busy
    python benchmarks/browsing.py runs/tiny --quick     some seconds, to see that it runs

It starts a server of its own. First one client steers, token by token as the page does, and reads texts, each time another one:
the table shows the wait for the first token, for all of them, and the server's CPU time. Bare generations of the same model, in
this process, take turns with what the pages write. A sweep over latents chosen at random
then shows how many continuations repeat themselves at each strength, which is what the form's default is chosen by.

Then three tabs read while one never stops steering. Each tab asks for another page as soon as somebody has seen the last one: the
suite, an SAE, a latent, a search. Rounds without and with steering take turns. At first a page of another site asks for a
steering: it gets 403, and no model is loaded. The table shows each tab, then each kind of page; `results.json` lies in `--out`.
What else runs on the machine counts: its load is printed beside the numbers.
"""

import argparse
import json
import os
import random
import re
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
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import torch
from rich.console import Console
from rich.table import Table

from everyscope.browse.live import Push
from everyscope.browse.live_model import SuiteModel
from everyscope.sites.model import load_language_model
from everyscope.suite.reader import Suite, load_suite, model_of

TABS = 3
LOOK_SECONDS = (0.05, 0.3)
"""How long somebody looks at a page, at random between the two [s]."""
PROMPT, TOKENS = "def f(x):", 200
"""Continued with and without a latent, by so many tokens each, which is the most that a page asks for [tokens]."""
STEER_TOKENS = 40
"""Of the continuations that one client waits for [tokens]."""
TEXT_WORDS = 96
"""Of the texts that it reads, about 100 tokens [words]."""
SENTENCE = "the value of each name in this list was read from a file and written to another one when it had changed"
SWEPT_PROMPTS = ("def read(self, path):\n", "The first time that I saw the city")
FAR = 1.0
"""KL divergence of a continuation above which it counts as far from the model's own text [nats per token]."""
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0
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

    def stream(self, fields: dict[str, Any]) -> tuple[float, float, list[dict[str, Any]]]:
        """Seconds until the first token and until all are there, and every line."""
        start, first, lines = time.perf_counter(), 0.0, []
        body = urlencode(fields).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/steer/stream", data=body)) as answer:
            for line in answer:
                first = first or time.perf_counter() - start
                if line.startswith(b"data: "):
                    lines.append(json.loads(line[len(b"data: ") :]))
        return first, time.perf_counter() - start, lines

    def cpu_seconds(self) -> float:
        """CPU time that the server has taken [s]; 0 where the system does not say."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.is_file():
            return 0.0
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS


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


def words(random_: random.Random, count: int) -> str:
    """A text that nobody has read yet."""
    return " ".join(random_.choice(SENTENCE.split(" ")) for _ in range(count))


def chosen(suite: Suite) -> str:
    """The SAE whose latents are pushed: one of the residual stream, where there is one."""
    return max(suite.index.saes, key=lambda record: (record.site == "resid_post", -abs(record.layer - 2))).folder


def wait_for_model(server: Server, suite: Suite, count: int, text_words: int = TEXT_WORDS) -> list[dict[str, Any]]:
    """One client that steers and reads, `count` times each: a row for each kind of wait."""
    random_, waits, cpu = random.Random(0), {}, {}
    sae = chosen(suite)
    width = min(64, next(record.width for record in suite.index.saes if record.folder == sae))

    def timed(name: str, wait: float, before: float) -> None:
        waits.setdefault(name, []).append(wait)
        cpu.setdefault(name, []).append(server.cpu_seconds() - before)

    lengths: list[int] = []
    for number in range(count + 1):
        before = server.cpu_seconds()
        fields = {
            "prompt": words(random_, min(12, text_words)),
            "sae": sae,
            "latent": random_.randrange(width),
            "tokens": STEER_TOKENS,
        }
        first, whole, _ = server.stream({**fields, "strength": 0.5, "temperature": 1, "seed": number})
        if number:  # the first reads the SAE
            timed("steer, first token", first, before)
            timed(f"steer, {STEER_TOKENS} tokens twice", whole, before)
        for name, address in (("all layers", "/text?"), ("one SAE", f"/text?sae={quote(sae)}&")):
            before, text = server.cpu_seconds(), words(random_, text_words)
            start = time.perf_counter()
            with urllib.request.urlopen(f"{server.address}{address}text={quote(text)}") as answer:
                page = answer.read().decode()
            if number:
                lengths.append(1 + max(map(int, re.findall(r'aria-label="token (\d+),', page))))
                timed(f"text, {name}", time.perf_counter() - start, before)
    waits = {name.replace("text,", f"text of {min(lengths)} to {max(lengths)} tokens,"): wait for name, wait in waits.items()}
    cpu = dict(zip(waits, cpu.values(), strict=True))
    return [{"what": name, **row_of(waits[name]), "cpu": 1000 * statistics.median(cpu[name])} for name in sorted(waits)]


def sweep(server: Server, suite: Suite, count: int) -> list[dict[str, Any]]:
    """Continuations at each strength of a sweep, of `count` latents: how many repeat themselves, and their divergence."""
    random_, found = random.Random(1), {}
    records = [record for record in suite.index.saes if record.site == "resid_post"] or list(suite.index.saes)
    for number in range(count):
        record = random_.choice(records)
        fields = {"sae": record.folder, "latent": random_.randrange(record.width), "strength": 1, "sweep": 1, "seed": number}
        prompt = SWEPT_PROMPTS[number % len(SWEPT_PROMPTS)]
        *steps, last = server.stream({**fields, "prompt": prompt, "tokens": STEER_TOKENS})[2]
        if len(steps) < STEER_TOKENS:
            continue  # a column that ended has nothing to repeat
        columns = zip(steps[0]["titles"], steps[-1]["repeats"], last["html"].split("<h3>")[1:], strict=True)
        for title, repeats, card in columns:
            kl = re.search(r"<dt>KL</dt><dd>([\d.]+)", card)
            found.setdefault(title, []).append((repeats, float(kl[1]) if kl else 0.0))
    return [
        {
            "strength": title,
            "continuations": len(rows),
            "repeating": sum(repeats for repeats, _ in rows) / len(rows),
            "kl": statistics.median(kl for _, kl in rows),
            "far": sum(kl > FAR for _, kl in rows) / len(rows),
        }
        for title, rows in found.items()
    ]


@torch.no_grad()
def beside_bare(folder: Path, sae: str, rounds: int) -> list[dict[str, Any]]:
    """CPU time of one thread for two bare generations, and for both columns and a sweep of five as the pages write them."""
    live, before = SuiteModel(folder), torch.get_num_threads()
    live.threads = dict.fromkeys(live.threads, 1)
    model: Any = load_language_model(model_of(folder, load_suite(folder).index.model)).model
    columns = [[Push(sae, 0, strength)] for strength in (0.0, 1.0, -1.0, 2.0, 3.0)]

    def bare() -> None:
        for _ in range(2):
            cache, fed = None, torch.full((1, 12), 5)
            for _ in range(STEER_TOKENS):
                output = model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def written(count: int) -> None:
        live.write(PROMPT, columns[:count], num_tokens=STEER_TOKENS, temperature=0.7, seed=0)

    ways = {"two bare generations": bare, "two columns": partial(written, 2), "a sweep of five": partial(written, 5)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    torch.set_num_threads(1)
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                seconds[name].append(1000 * (time.process_time() - start))
    torch.set_num_threads(before)
    return [{"what": name, "rounds": rounds, "cpu": statistics.median(found)} for name, found in seconds.items()]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As many programs that each keep a core busy, while the block runs."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.terminate()
            program.wait()


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


def shown(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    """A table; `columns` gives each name its format."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(format(value, form) for value, form in zip(row.values(), columns.values(), strict=True)))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run, or its suite")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each round of tabs")
    parser.add_argument("--rounds", type=int, default=3, help="of tabs")
    parser.add_argument("--count", type=int, default=20, help="steerings and texts that one client waits for")
    parser.add_argument("--latents", type=int, default=100, help="that are swept")
    parser.add_argument("--busy", type=int, default=0, help="programs beside it that keep a core busy")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "browsing")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds, options.count, options.latents = 1.0, 1, 2, 2
    folder = options.folder / "suite" if (options.folder / "suite").is_dir() else options.folder
    suite, visits, num_steered = load_suite(folder), [], 0
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with serving(folder, options.out / "index") as server, busy(options.busy):
        refuse_strangers(server)
        server.stream({"prompt": PROMPT, "tokens": 1})  # loads the model
        load = os.getloadavg()[0]
        beside = f"{options.busy} busy programs beside, load {load:.1f} before, {os.cpu_count()} cores"
        live = wait_for_model(server, suite, options.count, 6 if options.quick else TEXT_WORDS)
        columns = {
            "one client": "",
            "times": "d",
            "p50 [ms]": ".0f",
            "p95 [ms]": ".0f",
            "max [ms]": ".0f",
            "CPU, p50 [ms]": ".0f",
        }
        console.print(shown(f"{suite.index.title}; {beside}", columns, live))
        paired = beside_bare(folder, chosen(suite), max(1, options.count // 4))
        columns = {f"{STEER_TOKENS} tokens each": "", "rounds": "d", "CPU, p50 [ms]": ".0f"}
        console.print(shown(f"{suite.index.title}: one thread, in turns", columns, paired))
        swept = sweep(server, suite, options.latents)
        columns = {
            "strength": "",
            "continuations": "d",
            "repeat themselves": ".1%",
            "KL, p50 [nats/token]": ".2f",
            f"KL above {FAR:g}": ".1%",
        }
        console.print(shown(f"{suite.index.title}: sweeps", columns, swept))
        for number in range(options.rounds):
            for is_steering in (False, True):
                found, steered = visit(server, suite, options.seconds, is_steering, number)
                visits, num_steered = visits + found, num_steered + steered
    rows = tables(visits)
    columns = {"steering": "", "what": "", "pages": "d", "p50 [ms]": ".0f", "p95 [ms]": ".0f", "max [ms]": ".0f"}
    listed = [{**row, "steering": "yes" if row["steering"] else "no"} for row in rows]
    console.print(shown(f"{suite.index.title}: {num_steered} steers of {TOKENS} tokens twice; {beside}", columns, listed))
    results = {"command": sys.argv, "load": load, "cores": os.cpu_count(), "steered": num_steered, "rows": rows}
    results |= {"live": live, "paired": paired, "swept": swept, "visits": [asdict(one) for one in visits]}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
