"""everyscope's training beside other trainers': the same rows, sizes and threads, in one run of interleaved rounds.

    python benchmarks/training.py                            seconds a step, all at the same L0
    python benchmarks/training.py --quality --rounds 0       held-out FVU against rows and against seconds of training
    python benchmarks/training.py --only everyscope,sparsify --width 16384 --set everyscope.coefficient=1e-3,2e-3

Prints a table; results.json (with device, versions, sizes and the command line) and the figure lie in --out.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from activations import CACHE, MAKERS, activations
from matplotlib.figure import Figure
from peers.launch import PACKAGES, Worker, python_of
from peers.worker import Settings
from rich.console import Console
from rich.table import Table

from everyscope.base.files import make_folder, write_json
from everyscope.base.progress import meter, say

PAUSE = 0.5
"""Before what is timed, so that the threads of what came before have gone to sleep; they may spin for 0.2 [s]."""
CANDIDATES = {
    "everyscope": {},
    "dense_autograd": {"coefficient": [1e-3, 1.4e-3, 2e-3]},
    "dictionary_learning": {"lr": [1e-3, 3e-3], "bandwidth": [0.05]},
    "saelens": {
        "jumprelu_init_threshold": [0.8, 1.0, 1.2],
        "l0_coefficient": [0.2],
        "lr": [3e-3],
        "decoder_init_norm": [0.5],
        "jumprelu_bandwidth": [1.0],
    },
}
"""What is tried in a quality run of some hundred steps. The defaults of the last two are for many thousand: with those their L0
would not come near what is wanted. So short a run hardly moves SAELens' thresholds, and their start decides its L0."""
STILL = {
    "everyscope": {"learning_rate": 1e-9},
    "dense_autograd": {"learning_rate": 1e-9},
    "dictionary_learning": {"lr": 1e-9},
    "saelens": {"lr": 1e-9},
    "sparsify": {"lr": 1e-9},
}
"""Rates at which all of a step is computed but its L0 stays where it was set, for a speed run."""
NEAR = 0.1
"""A trainer has met the L0 that was asked for if it is off by at most this share [1]."""

Measured = list[dict[str, Any]]


def measure_speed(workers: Sequence[Worker], options: argparse.Namespace) -> Measured:
    """Rounds in which each trainer in turn takes some steps at the L0; a record per trainer and round."""
    records = []
    with meter("speed", (options.rounds + 1) * len(workers), "turns") as progress:
        for worker in workers:
            worker.ask(set_l0=options.l0)
            worker.ask(steps=options.settle)
            progress.advance()
        for number in range(options.rounds):
            first = number % len(workers)
            for worker in (*workers[first:], *workers[:first]):
                records.append({"trainer": worker.trainer, "round": number} | turn(worker, options))
                progress.advance()
    return records


def turn(worker: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one trainer in a row, at the L0; then its product alone."""
    worker.ask(set_l0=options.l0)
    time.sleep(PAUSE)
    answer = worker.ask(steps=options.steps)
    alone = worker.ask(product=options.steps)
    return {
        "seconds": answer["seconds"],
        "product_seconds": alone,
        "peak_bytes": answer["peak_bytes"],
        "l0": worker.ask(evaluate=True)["l0"],
    }


def summarise_speed(records: Measured, batch: int) -> Measured:
    """A line per trainer: medians over all its steps, and ratios to the first trainer, round by round."""
    names = list(dict.fromkeys(record["trainer"] for record in sorted(records, key=lambda record: record["round"])))
    of = {name: sorted((r for r in records if r["trainer"] == name), key=lambda r: r["round"]) for name in names}

    def in_round(name: str) -> list[float]:
        return [statistics.median(record["seconds"]) for record in of[name]]

    lines = []
    for name, own in of.items():
        ratios = [mine / first for mine, first in zip(in_round(name), in_round(names[0]), strict=True)]
        step = statistics.median(second for record in own for second in record["seconds"])
        share = {
            dtype: statistics.median(
                statistics.median(record["product_seconds"][dtype]) / statistics.median(record["seconds"]) for record in own
            )
            for dtype in ("float32", "bfloat16")
        }
        peaks = [record["peak_bytes"] for record in own if record["peak_bytes"]]
        lines.append(
            {
                "trainer": name,
                "seconds_per_step": step,
                "rows_per_second": batch / step,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "product_share": share,
                "peak_bytes": max(peaks, default=None),
                "l0": statistics.median(record["l0"] for record in own),
            }
        )
    return lines


def milestones(rows: int, batch: int, points: int) -> list[int]:
    """Steps at which a run of `rows` rows is measured: its end, half of it, a quarter, ... `points` in all at most."""
    last = rows // batch
    return sorted({last >> halvings for halvings in range(points)} - {0})


def measure_quality(workers: Sequence[Worker], options: argparse.Namespace) -> Measured:
    """A record per worker with its curve; between milestones the workers train in turn, and only training is timed."""
    curves: list[list[dict[str, float]]] = [[] for _ in workers]
    seconds = [0.0] * len(workers)
    stops = milestones(options.rows, options.batch, options.points)
    with meter("quality", stops[-1] * len(workers), "steps") as progress:
        for before, stop in pairwise([0, *stops]):
            for index, worker in enumerate(workers):
                time.sleep(PAUSE)
                seconds[index] += sum(worker.ask(steps=stop - before)["seconds"])
                point = {"rows": stop * options.batch, "seconds": seconds[index]}
                curves[index].append(point | worker.ask(evaluate=True))
                progress.advance(stop - before)
    return [
        {"trainer": worker.trainer, "knobs": worker.settings.knobs, "curve": curve}
        for worker, curve in zip(workers, curves, strict=True)
    ]


def choose(records: Measured, l0: float) -> Measured:
    """Of each trainer's runs the one of least FVU among those that met the L0, or else the one that came nearest."""

    def rank(record: dict[str, Any]) -> tuple[bool, float]:
        end = record["curve"][-1]
        miss = abs(np.log(max(end["l0"], 1e-9) / l0))
        is_near = miss <= np.log(1 + NEAR)
        return not is_near, end["fvu"] if is_near else miss

    names = dict.fromkeys(record["trainer"] for record in records)
    return [min((record for record in records if record["trainer"] == name), key=rank) for name in names]


def draw(records: Measured, options: argparse.Namespace) -> Figure:
    """FVU against rows and against seconds. A point is filled where the L0 is met: FVU means little at another one."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (key, label) in zip(panels, (("rows", "rows seen"), ("seconds", "seconds of training")), strict=True):
        for number, record in enumerate(records):
            curve, colour = record["curve"], f"C{number}"
            x, fvu = [point[key] for point in curve], [point["fvu"] for point in curve]
            panel.plot(x, fvu, color=colour, linewidth=1.5, label=record["trainer"])
            faces = [colour if abs(point["l0"] / options.l0 - 1) <= NEAR else "white" for point in curve]
            panel.scatter(x, fvu, s=22, c=faces, edgecolors=colour, zorder=3)
            panel.annotate(f"L0 {curve[-1]['l0']:.0f}", (x[-1], fvu[-1]), (5, 0), textcoords="offset points", color=colour)
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_ylim(top=min(1.0, panel.get_ylim()[1]))  # 1 is what the mean alone would leave
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].set_ylabel("held-out FVU")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{options.data}, width {options.width}, batch {options.batch}, {options.threads} threads (filled: L0 met)")
    return figure


def speed_table(lines: Measured, title: str) -> Table:
    """The summary of a speed run for people."""
    columns = ("trainer", "s / step", "rows / s", "ratio", "range", "float32 product", "bfloat16", "peak GB", "L0")
    table = Table(*columns, title=title)
    for line in lines:
        low, high = line["ratio_range"]
        peak = "-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e9:.2f}"
        shares = [f"{line['product_share'][dtype]:.0%}" for dtype in ("float32", "bfloat16")]
        numbers = [f"{line['seconds_per_step']:.4f}", f"{line['rows_per_second']:,.0f}", f"{line['ratio']:.2f}"]
        table.add_row(line["trainer"], *numbers, f"{low:.2f}-{high:.2f}", *shares, peak, f"{line['l0']:.1f}")
    return table


def quality_table(records: Measured, title: str) -> Table:
    """Where each trainer's chosen run ended."""
    table = Table("trainer", "knobs", "rows", "training s", "FVU", "L0", "dead", title=title)
    for record in records:
        end, knobs = record["curve"][-1], ", ".join(f"{name}={value:g}" for name, value in record["knobs"].items())
        numbers = [f"{end['rows']:,}", f"{end['seconds']:.1f}", f"{end['fvu']:.4f}", f"{end['l0']:.1f}"]
        table.add_row(record["trainer"], knobs, *numbers, f"{end['dead_fraction']:.1%}")
    return table


def device() -> dict[str, Any]:
    """What all of it ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def parse_knobs(assignments: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """`trainer.knob=value,value` to values by trainer and knob."""
    knobs: dict[str, dict[str, list[float]]] = {}
    for assignment in assignments:
        name, _, values = assignment.partition("=")
        trainer, _, knob = name.partition(".")
        if trainer not in PACKAGES or not knob or not values:
            raise SystemExit(f"--set {assignment}: expected TRAINER.KNOB=VALUE,... with a trainer of {', '.join(PACKAGES)}")
        knobs.setdefault(trainer, {})[knob] = [float(value) for value in values.split(",")]
    return knobs


def combinations(knobs: dict[str, list[float]]) -> list[dict[str, float]]:
    """Every choice of one value for each knob."""
    return [dict(zip(knobs, values, strict=True)) for values in product(*knobs.values())]


@contextmanager
def started(tasks: list[tuple[str, dict[str, float]]], steps: int, options: argparse.Namespace) -> Iterator[list[Worker]]:
    """A worker for each trainer with its knobs, ended with the block."""
    path = (
        str(activations(options.data, options.cache).resolve()) if options.data in MAKERS else str(Path(options.data).resolve())
    )
    shared = {name: getattr(options, name) for name in ("width", "batch", "l0", "threads", "seed")}
    shared["held_out"] = options.held_out and str(Path(options.held_out).resolve())
    pythons = {trainer: python_of(trainer, options.cache) for trainer, _ in tasks}
    with ExitStack() as stack:
        workers = []
        for number, (trainer, knobs) in enumerate(tasks):
            settings = Settings(data=path, steps=steps, knobs=knobs, **shared)
            workers.append(Worker(trainer, settings, pythons[trainer], options.out / f"{trainer}_{number}.log"))
            stack.callback(workers[-1].close)
        for worker in workers:
            say(f"  {worker.trainer} {worker.greeting['version']}, torch {worker.greeting['torch']} {worker.settings.knobs}")
        yield workers


def run_speed(options: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    """Measure, add to `results` and print."""
    knobs = parse_knobs(options.set)
    tasks = [(name, STILL[name] | combinations(knobs.get(name, {}))[0]) for name in options.only]
    with started(tasks, options.settle + options.rounds * options.steps, options) as workers:
        results["versions"] |= {worker.trainer: worker.greeting for worker in workers}
        records = measure_speed(workers, options)
    lines = summarise_speed(records, options.batch)
    results["speed"] = {"summary": lines, "rounds": records}
    console.print(
        speed_table(
            lines,
            f"one step at L0 {options.l0:g}: medians; ratios to the first, round by round; what its product alone takes of it",
        )
    )


def run_quality(options: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    """Train, add to `results`, print and draw."""
    knobs = parse_knobs(options.set)
    tasks = [(name, choice) for name in options.only for choice in combinations(CANDIDATES.get(name, {}) | knobs.get(name, {}))]
    with started(tasks, options.rows // options.batch, options) as workers:
        results["versions"] |= {worker.trainer: worker.greeting for worker in workers}
        records = measure_quality(workers, options)
    chosen = choose(records, options.l0)
    results["quality"] = {"chosen": chosen, "all": records}
    console.print(quality_table(chosen, f"after {chosen[0]['curve'][-1]['rows']:,} rows, L0 {options.l0:g} wanted"))
    figure = draw(chosen, options)
    for ending in ("svg", "png"):
        figure.savefig(options.out / f"quality.{ending}", dpi=150)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(PACKAGES), help=f"of {','.join(PACKAGES)}")
    parser.add_argument("--data", default="minilm", help=f"{', '.join(MAKERS)}, or a .npy file, float32 [rows, d_in], shuffled")
    parser.add_argument("--held-out", help="a .npy file of rows of other documents, to measure on; else the last rows of --data")
    parser.add_argument("--width", type=int, default=8192, help="latents")
    parser.add_argument("--batch", type=int, default=2048, help="rows in a batch")
    parser.add_argument("--l0", type=float, default=50, help="latents wanted on a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed measurement; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=5, help="steps of each trainer in a round")
    parser.add_argument("--settle", type=int, default=5, help="steps of each trainer before the first round")
    parser.add_argument("--quality", action="store_true", help="train, and measure held-out rows on the way")
    parser.add_argument("--rows", type=int, default=524_288, help="rows that each trainer sees for --quality")
    parser.add_argument("--points", type=int, default=7, help="measurements on the way, each at double the rows")
    parser.add_argument("--set", action="append", default=[], metavar="TRAINER.KNOB=VALUE,...", help="knobs, or values to try")
    parser.add_argument("--cache", type=Path, default=CACHE, help="arrays and environments")
    parser.add_argument("--out", type=Path, default=CACHE / "results", help="results.json, figure, logs of the workers")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PACKAGES):
        parser.error(f"--only {','.join(sorted(unknown))}: no such trainer; there are {', '.join(PACKAGES)}")
    return options


def main() -> None:
    """Measure what is asked for."""
    options = parse()
    console = Console() if sys.stdout.isatty() else Console(width=130)  # a pipe counts as 80 columns
    make_folder(options.out)
    sizes = {name: value for name, value in vars(options).items() if name not in ("cache", "out")}
    results: dict[str, Any] = {"device": device(), "command": shlex.join(sys.argv), "settings": sizes, "versions": {}}
    if options.rounds:
        run_speed(options, results, console)
    if options.quality:
        run_quality(options, results, console)
    write_json(options.out / "results.json", json.loads(json.dumps(results)))
    console.print(f"{device()['processor']}, {options.threads} of {os.cpu_count()} cores; {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
