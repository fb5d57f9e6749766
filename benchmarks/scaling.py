"""What more workers bring: harvest and training groups with one process and with several, what ranks of one SAE sum, a simulated
cluster.

    python benchmarks/scaling.py                       1 and 2 workers, interleaved rounds; 2 and 4 ranks; curves to 1,024 devices
    python benchmarks/scaling.py --quick               small sizes, to see that it runs
    python benchmarks/scaling.py --only curve --json   one part; the results on standard output

Measured are harvest (rows a second, partitions of one folder) and training groups (rows times SAEs a second, each training group
in one process), as
`everyscope run` divides them among processes: each takes an equal share of the cores. All workers are warm, and start together.
Beside them stands one worker with the threads that each of several has: `left` is what a worker does beside the others,
as a share of what it does alone with as many threads. Machines whose cores share caches and memory leave less than 1.

Counted are bytes that ranks sum in a step, against the planner's formulas; they must agree to the byte. Simulated is
`everyscope plan gemma_2_2b --gpus 1024 --curve`; what it assumes stands beside it. Results lie in results.json in --out.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from training import device

from everyscope.activations.harvest.run import run as harvest
from everyscope.base.files import make_folder, write_json
from everyscope.base.progress import say
from everyscope.run.config import RunConfig
from everyscope.run.cost.cluster import curve
from everyscope.run.cost.cluster_report import curve_table
from everyscope.run.find import find_recipe
from everyscope.run.pipeline import quiet_transformers
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.mesh import Mesh
from everyscope.sae.normalisation import Normalisation
from everyscope.train.devices import device_of
from everyscope.train.launch import RankInfo, launch
from everyscope.train.process_group import ProcessGroup, file_store
from everyscope.train.run import run as train
from everyscope.train.step_time import ASSUMED, Load, summed_bytes
from everyscope.train.training_group import TrainingGroup

PARTS = ("harvest", "groups", "sums", "curve")
KINDS = ("h100", "h200")
"""Devices of the simulated curves."""
MESHES = ((2, 1), (1, 2), (2, 2))
"""Latent shards and replicas whose sums are counted."""
Work = Callable[[int, int], int]
"""What worker `index` of `count` does; the units that it has done."""


def recipe_for(options: argparse.Namespace) -> RunConfig:
    """The laptop's recipe at the sizes asked for: some sites, one training group at each."""
    config = find_recipe("tiny")
    group = config.groups[0].model_copy(update={"layers": tuple(range(options.layers)), "num_tokens": options.tokens})
    harvest_settings = config.harvest.model_copy(update={"bucket_rows": options.bucket_rows})
    plain = {"groups": (group,), "harvest": harvest_settings, "instruction_tuned": None, "random_weights": None}
    return config.model_copy(update=plain)


def harvest_part(folder: Path, options: argparse.Namespace, index: int, count: int) -> int:
    """Write a partition; the rows of all sites together, as every worker's share of them is equal."""
    config = recipe_for(options).harvest_config(folder)
    harvest(config.model_copy(update={"partition": (index, count)}))
    return options.tokens * len(config.sites) // count


def train_part(folder: Path, shards: Path, options: argparse.Namespace, index: int, count: int) -> int:
    """Train every `count`-th training group; rows times SAEs."""
    training_groups = [
        training_group.model_copy(update={"shards": shards / training_group.site.folder})
        for training_group in recipe_for(options).train_configs(folder)
    ]
    mine = training_groups[index::count]
    for training_group in mine:
        train(training_group)
    return sum(training_group.steps * training_group.settings.batch_rows * len(training_group.saes) for training_group in mine)


def worker(warm: Work, work: Work, place: tuple[int, int], threads: int, barrier: Any, results: Any) -> None:
    """A worker process: warms up, waits for the others, works, and says when it began and ended."""
    torch.set_num_threads(threads)
    quiet_transformers()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress of several at once
        try:
            warm(*place)
        except BaseException:
            barrier.abort()  # else the others would wait for ever
            raise
        barrier.wait()
        start = time.time()
        units = work(*place)
        results.put((start, time.time(), units))


def units_per_second(warm: Work, work: Work, count: int, threads: int) -> float:
    """Units a second of `count` processes side by side, from the first that begins to the last that ends."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(warm, work, (index, count), threads, barrier, results), daemon=True)
        for index in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"a worker left with exit code {process.exitcode}; its output is above")
    found = [results.get() for _ in processes]
    starts, ends, units = zip(*found, strict=True)
    return sum(units) / (max(ends) - min(starts))


def measure_workers(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a round and way: how many workers with how many threads each, and units a second."""
    cores, records = os.cpu_count() or 1, []
    ways = sorted({(count, max(1, cores // other)) for other in options.workers for count in (1, other)})
    small = argparse.Namespace(**vars(options) | {"tokens": options.warm_tokens, "bucket_rows": options.warm_tokens})
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scaling_") as name:
        folder = Path(name)
        harvest_part(folder / "small", small, 0, 1)
        harvest_part(folder / "large", options, 0, 1)
        for number in range(options.rounds):
            for count, threads in ways if number % 2 == 0 else ways[::-1]:
                out = folder / f"{number}_{count}_{threads}"
                if part == "harvest":
                    warm: Any = functools.partial(harvest_alone, out / "warm", small)
                    work: Any = functools.partial(harvest_part, out / "work", options)
                else:
                    warm = functools.partial(train_alone, out / "warm", folder / "small" / "shards", small)
                    work = functools.partial(train_part, out / "work", folder / "large" / "shards", options)
                rate = units_per_second(warm, work, count, threads)
                shutil.rmtree(out)
                records.append({"round": number, "workers": count, "threads": threads, "units_per_second": rate})
                say(f"  {part}, round {number + 1}: {count} x {threads} threads, {rate:,.0f} a second")
    return records


def harvest_alone(folder: Path, options: argparse.Namespace, index: int, count: int) -> int:
    """To warm up: a harvest of a worker's own."""
    return harvest_part(folder / str(index), options, 0, 1)


def train_alone(folder: Path, shards: Path, options: argparse.Namespace, index: int, count: int) -> int:
    """To warm up: training groups of a worker's own."""
    return train_part(folder / str(index), shards, options, 0, 1)


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each way, and round by round: its ratio to one worker with all threads, and what is left of each worker."""
    rates = {(record["round"], record["workers"], record["threads"]): record["units_per_second"] for record in records}
    most = max(threads for _, _, threads in rates)
    lines = []
    for count, threads in sorted({way[1:] for way in rates}):
        rounds = sorted({number for number, *way in rates if tuple(way) == (count, threads)})
        own = [rates[number, count, threads] for number in rounds]
        ratios = [rates[number, count, threads] / rates[number, 1, most] for number in rounds]
        left = [rates[number, count, threads] / (count * rates[number, 1, threads]) for number in rounds]
        line: dict[str, Any] = {"workers": count, "threads": threads}
        for name, values in (("units_per_second", own), ("ratio", ratios), ("left", left)):
            line |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
        lines.append(line)
    return lines


def count_sums(config: dict[str, Any], rank_info: RankInfo, progress: Callable[[int], None]) -> None:
    """A rank: some steps of a training group, with the bytes that it sums in each beside those of the planner's formulas."""
    mesh = Mesh(config["shards"], config["replicas"], rank_info.rank)
    group = ProcessGroup(mesh, file_store(rank_info.rendezvous, rank_info.ranks))
    preset = SaePreset(initial_threshold=config["threshold"], learning_rate_warmup_steps=0)
    sae = SaeConfig(width=config["width"], sparsity_coefficient=1e-3, preset=preset)
    training_group = TrainingGroup([sae], config["d_in"], Normalisation(1.0), 10**6, engine=config["engine"], collective=group)
    load = Load.of(config["d_in"], config["width"], 1.0, config["batch"], mesh.shards, mesh.replicas)
    noise, lines = torch.Generator().manual_seed(mesh.replica), []
    for step in range(config["steps"]):
        before = dict(group.bytes_reduced)
        training_group.step(torch.nn.functional.normalize(torch.randn(load.part.rows, load.part.d_in, generator=noise)))
        moving = int((training_group.saes[0].touched == step + 1).sum())
        way = "dense" if config["engine"] == "dense" else "pairs_cpu"
        counted = {axis: group.bytes_reduced[axis] - before[axis] for axis in group.bytes_reduced}
        over_shards, over_replicas = summed_bytes(load, mesh.shards, mesh.replicas, way, moving)
        formula = {"shards": over_shards, "replicas": over_replicas}
        lines.append({"step": step, "moving": moving, "counted": counted, "formula": formula})
    write_json(Path(config["out"]) / f"rank_{rank_info.rank}.json", {"lines": lines})


def measure_sums(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per mesh and engine, the last step's bytes of rank 0, and whether those of all steps and ranks are the formulas'."""
    found = []
    for shards, replicas in MESHES[:2] if options.quick else MESHES:
        for engine in ("dense", "pairs"):
            with tempfile.TemporaryDirectory(dir=options.out, prefix="scaling_") as name:
                sizes = {"d_in": options.d_in, "width": options.width, "batch": options.batch, "steps": options.steps}
                config = sizes | {"shards": shards, "replicas": replicas, "engine": engine, "threshold": 3 / options.d_in**0.5}
                launch(count_sums, config | {"out": name}, shards * replicas, max_restarts=0)
                ranks = [json.loads(path.read_text())["lines"] for path in sorted(Path(name).iterdir())]
            agree = all(
                line["counted"][axis] == size for rank in ranks for line in rank for axis, size in line["formula"].items()
            )
            last = ranks[0][-1]
            found.append({"shards": shards, "replicas": replicas, "engine": engine, "agrees": agree, **sizes, **last})
            say(f"  {shards} x {replicas}, {engine}: {last['counted']}, {'as' if agree else 'NOT as'} the formulas say")
    return found


def worker_table(lines: Sequence[dict[str, Any]], title: str) -> Table:
    """The summary for people."""
    table = Table("workers", "threads each", "a second", "ratio", "range", "left of each", "range", title=title)
    for line in lines:
        cells = [f"{line['units_per_second']:,.0f}"]
        for name in ("ratio", "left"):
            cells += [f"{line[name]:.2f}", "{:.2f}-{:.2f}".format(*line[f"{name}_range"])]
        table.add_row(str(line["workers"]), str(line["threads"]), *cells)
    return table


def sum_table(lines: Sequence[dict[str, Any]]) -> Table:
    """What was counted, for people."""
    title = "Bytes that a rank sums in a step: over latent shards, over replicas, over all; the first two as the formulas say"
    table = Table("shards", "replicas", "engine", "moving", "shards", "replicas", "all", "agrees", title=title)
    for line in lines:
        counted = [f"{line['counted'][axis]:,}" for axis in ("shards", "replicas", "all")]
        first = [str(line[name]) for name in ("shards", "replicas", "engine", "moving")]
        table.add_row(*first, *counted, "yes" if line["agrees"] else "NO")
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: tuple(names.split(",")), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--workers", type=lambda counts: [int(count) for count in counts.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2**16, help="rows of each site, and of each SAE's training")
    parser.add_argument("--bucket-rows", type=int, default=2**14, help="rows of a bucket, which one worker writes")
    parser.add_argument("--layers", type=int, default=2, help="of the bundled model; three sites and training groups in each")
    parser.add_argument("--d-in", type=int, default=128, help="of the SAE that ranks share")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small sizes; rates mean nothing")
    parser.add_argument("--json", action="store_true", help="results on standard output instead of tables")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "scaling")
    options = parser.parse_args(arguments)
    options.warm_tokens = 2**12
    if options.quick:
        options.rounds, options.tokens, options.bucket_rows, options.layers = 1, 2**12, 2**10, 1
        options.warm_tokens, options.d_in, options.width, options.batch, options.steps = 2**10, 24, 256, 64, 3
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: no such part; there are {', '.join(PARTS)}")
    if min(options.workers) < 1:
        parser.error(f"--workers {min(options.workers)}: expected 1 or more")
    return options


def main() -> None:
    """Measure, count and simulate what is asked for."""
    options = parse()
    make_folder(options.out)
    quiet_transformers()
    console = Console(file=sys.stderr if options.json else sys.stdout, width=None if sys.stdout.isatty() else 130)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    results: dict[str, Any] = {"device": device(), "command": shlex.join(sys.argv), "settings": settings}
    results["versions"] = {"torch": torch.__version__}
    for part, unit in (("harvest", "rows"), ("groups", "rows x SAEs")):
        if part in options.only:
            records = measure_workers(part, options)
            results[part] = {"unit": unit, "summary": summarise(records), "rounds": records}
            console.print(worker_table(results[part]["summary"], f"{part}, {unit} a second"))
    if "sums" in options.only:
        results["sums"] = measure_sums(options)
        console.print(sum_table(results["sums"]))
    if "curve" in options.only:
        config = find_recipe("gemma_2_2b")
        results["curve"] = {"recipe": config.name, "assumed": ASSUMED, "devices": {}}
        for kind in KINDS:
            lines = curve(config, kind)
            results["curve"]["devices"][kind] = {"device": device_of(kind).as_json(), "lines": lines}
            console.print(curve_table(lines, config.name, device_of(kind)))
    write_json(options.out / "results.json", json.loads(json.dumps(results)))
    if options.json:
        print(json.dumps(results, indent=2))
    console.print(f"{device()['processor']}, {os.cpu_count()} cores; {options.out / 'results.json'}")
    if not all(line["agrees"] for line in results.get("sums", [])):
        sys.exit("bytes that ranks summed are not those of the formulas: correct everyscope.train.step_time")


if __name__ == "__main__":
    main()
