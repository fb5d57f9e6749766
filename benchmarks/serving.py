"""How fast activations reach trainers: from files on this host, and from an activation server, beside the bare means of each.

    python benchmarks/serving.py                     1 to 3 readers, seven ways, in interleaved rounds; then amortisation
    python benchmarks/serving.py --quick             small sizes, to see that it runs
    python benchmarks/serving.py --only local,mmap --readers 1,3 --dtype bfloat16

The ways: mmap (blocks of mapped files, copied), local (LocalSource), handover (FlightSource that was handed the files), flight
(bare Arrow Flight, one call after another), flight4 (the same, four calls at a time, as our client does), remote and remote+any
(FlightSource over a socket, in fixed and in any order). A reader lands every byte in a batch in its own memory. CPU seconds are
those of readers and server; on another machine they say more than rates do. Prints tables; results.json lies in --out.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import torch
from rich.console import Console
from rich.table import Table
from training import device

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.origin import ShardOrigin
from everyscope.activations.serve.run import serving
from everyscope.activations.shards.format import CARRIER
from everyscope.activations.shards.manifest import read_manifest, read_sidecar, seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.base.files import make_folder, write_json
from everyscope.base.progress import meter, say

SITE = "resid_post/layer_0"
WAYS = ("mmap", "local", "handover", "flight", "flight4", "remote", "remote+any")
BARE_RING = 16
"""Chunks that the bare server keeps in memory and sends over and over."""
SPEEDS = (1.0, 0.5, 0.1)
"""Relative speeds of the trainers that share a server."""
START_SECONDS = 120.0
"""Longest wait for a process to be ready [s]."""


def activations(options: argparse.Namespace) -> Path:
    """A site of noise of the size asked for, written once."""
    folder = options.cache / f"{options.rows}_{options.d_in}_{options.dtype}" / SITE
    if not (folder / "manifest.json").exists():
        noise, per_shard = torch.Generator().manual_seed(0), min(options.rows, 1 << 19)
        count = -(-options.rows // per_shard)
        for index in range(count):
            rows, done = min(per_shard, options.rows - index * per_shard), 0
            with new_activation_shard(shard_path(folder, index), SITE, rows, options.d_in, options.dtype, 16, {}) as writer:
                while done < rows:
                    part = min(8192, rows - done)
                    places = np.arange(done, done + part)
                    writer.put(torch.randn(part, options.d_in, generator=noise), places, places, places % 16)
                    done += part
        seal_folder(folder, count, site=SITE, config={}, parents={}, version="0")
    return folder


class Mapped:
    """The least that reading files on this host can cost: whole blocks, copied from the map into a buffer, nothing checked."""

    def __init__(self, folder: Path) -> None:
        """Map every shard."""
        manifest = read_manifest(folder)
        self._tables = []
        for entry in manifest.shards:
            layout = read_sidecar(folder / entry.file).layout
            self._tables.append(layout.views(np.memmap(folder / entry.file, np.uint8, "r"))["activations"])
        self._out = np.empty((0, manifest.d_in), self._tables[0].dtype)

    def batch(self, step: int, rows: int) -> np.ndarray:
        """Batch `step` in the stored number format; batches do not cross from shard to shard."""
        per_table = [len(table) // rows for table in self._tables]
        step %= sum(per_table)
        number = 0
        while step >= per_table[number]:
            step -= per_table[number]
            number += 1
        table = self._tables[number]
        if len(self._out) != rows:
            self._out = np.empty((rows, table.shape[1]), table.dtype)
        self._out[:] = table[step * rows : (step + 1) * rows]
        return self._out


class BareServer(flight.FlightServerBase):
    """Arrow Flight and nothing else: chunks in memory, sent whole."""

    def __init__(self, chunk_rows: int, d_in: int, dtype: str) -> None:
        """Fill the ring and listen."""
        super().__init__("grpc://127.0.0.1:0")
        width = d_in * CARRIER[dtype].itemsize
        schema = pa.schema([pa.field("rows", pa.binary(width), nullable=False)])
        self._ring = []
        for index in range(BARE_RING):
            rows = np.random.default_rng(index).integers(0, 255, chunk_rows * width, np.uint8)
            column = pa.Array.from_buffers(schema.field(0).type, chunk_rows, [None, pa.py_buffer(rows)])
            self._ring.append(pa.Table.from_batches([pa.RecordBatch.from_arrays([column], schema=schema)]))

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        """Any chunk."""
        return flight.RecordBatchStream(self._ring[int(ticket.ticket) % BARE_RING])


class Bare:
    """A client of it, which lands each chunk in a buffer of its own, and gives batches as windows on that."""

    def __init__(self, location: str, chunk_rows: int, threads: int) -> None:
        """`threads` calls at a time."""
        self._client, self._chunk_rows, self._threads = flight.FlightClient(location), chunk_rows, threads
        self._pool, self._coming, self._last = ThreadPoolExecutor(threads), {}, (-1, np.empty(0, np.uint8))

    def _get(self, chunk: int) -> np.ndarray:
        parts = [message.data.column(0) for message in self._client.do_get(flight.Ticket(str(chunk).encode()))]
        views = [np.frombuffer(part.buffers()[1], np.uint8, len(part) * part.type.byte_width) for part in parts]
        out = np.empty(sum(len(view) for view in views), np.uint8)
        return np.concatenate(views, out=out)

    def batch(self, step: int, rows: int) -> np.ndarray:
        """Batch `step`; batches divide chunks."""
        chunk, offset = divmod(step * rows, self._chunk_rows)
        if self._threads == 1:
            if self._last[0] != chunk:
                self._last = chunk, self._get(chunk)
            whole = self._last[1]
        else:
            for wanted in range(chunk, chunk + self._threads):
                if wanted not in self._coming:
                    self._coming[wanted] = self._pool.submit(self._get, wanted)
            self._coming = {place: future for place, future in self._coming.items() if place >= chunk}
            whole = self._coming[chunk].result()
        size = len(whole) // self._chunk_rows
        return whole[offset * size : (offset + rows) * size]


def read(options: argparse.Namespace) -> None:
    """A reader process: says it is ready, and for each line of its input reads as many batches as that says."""
    torch.set_num_threads(1)
    way, folder = options.worker, options.folder
    if way == "mmap":
        source: Any = Mapped(folder)
    elif way == "local":
        source = LocalSource(folder)
    elif way.startswith("flight"):
        source = Bare(options.url, options.chunk_rows, 4 if way == "flight4" else 1)
    else:
        journal = options.out / f"{os.getpid()}.journal" if way == "remote+any" else None
        order = "fixed" if journal is None else "any"
        source = FlightSource(options.url, order=order, journal=journal, use_files=way == "handover", trainer=f"r{os.getpid()}")
    step = 0
    print("ready", flush=True)
    for line in sys.stdin:
        batches, pause = line.split()
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(int(batches)):
            source.batch(step, options.batch)
            step += 1
            if float(pause):
                time.sleep(float(pause))
        print(json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}), flush=True)


def serve(options: argparse.Namespace) -> None:
    """A server process, ours or the bare one: says where it listens, and ends with its input."""
    with ExitStack() as stack:
        if options.worker == "serve-bare":
            server: Any = BareServer(options.chunk_rows, options.d_in, options.dtype)
            threading.Thread(target=server.serve, daemon=True).start()
        else:
            config = ServeConfig(
                shards=options.folder, listen="127.0.0.1:0", chunk_rows=options.chunk_rows, buffer_bytes=options.buffer_bytes
            )
            server = stack.enter_context(serving(config, ShardOrigin(config.shards, config.chunk_rows)))
        print(server.port, flush=True)
        for _ in sys.stdin:
            print(json.dumps(server.buffer.report() if hasattr(server, "buffer") else {}), flush=True)
        if options.worker == "serve-bare":
            os._exit(0)


class Process:
    """One of the above in a process of its own."""

    def __init__(self, worker: str, options: argparse.Namespace, url: str = "") -> None:
        """Start it."""
        names = ("folder", "chunk_rows", "d_in", "dtype", "buffer_bytes", "batch", "out")
        given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        command = [sys.executable, __file__, "--worker", worker, "--url", url, *given]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (options.out / f"{worker}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    @cached_property
    def greeting(self) -> str:
        """What it says when it is ready."""
        return self.hear()

    def tell(self, line: str) -> None:
        """Write it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self.process.wait()}; its log lies in --out")
        return line.strip()

    @property
    def cpu(self) -> float:
        """CPU seconds that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(START_SECONDS)


@contextmanager
def started(worker: str, count: int, options: argparse.Namespace, url: str = "") -> Iterator[list[Process]]:
    """`count` processes, ended with the block; they start side by side, and asking for their greetings waits for them."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            processes.append(Process(worker, options, url))
            stack.callback(processes[-1].close)
        yield processes


def turn(readers: list[Process], server: Process | None, options: argparse.Namespace) -> dict[str, float]:
    """All readers at once read their share; rates over the time of the slowest."""
    batches = max(1, options.bytes_per_turn // options.batch_bytes)
    before = server.cpu if server else 0.0
    start = time.perf_counter()
    for reader in readers:
        reader.tell(f"{batches} 0")
    answers = [json.loads(reader.hear()) for reader in readers]
    seconds = time.perf_counter() - start
    gigabytes = len(readers) * batches * options.batch_bytes / 1e9
    reader_cpu, server_cpu = sum(answer["cpu"] for answer in answers), (server.cpu if server else 0.0) - before
    return {
        "gigabytes_per_second": gigabytes / seconds,
        "reader_cpu_seconds_per_gigabyte": reader_cpu / gigabytes,
        "server_cpu_seconds_per_gigabyte": server_cpu / gigabytes,
    }


def measure_rates(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per way, number of readers and round; the ways take turns within a round, each round begins with another."""
    records = []
    with ExitStack() as stack:
        bare = stack.enter_context(started("serve-bare", 1, options))[0]
        ours = stack.enter_context(started("serve", 1, options))[0]
        urls = {"flight": f"grpc://127.0.0.1:{bare.greeting}", "ours": f"flight://127.0.0.1:{ours.greeting}/{SITE}"}
        with meter("rates", len(options.readers) * (options.rounds + 1) * len(options.only), "turns") as progress:
            for count in options.readers:
                with ExitStack() as now:
                    sets = {}
                    for way in options.only:
                        url = urls["flight"] if way.startswith("flight") else urls["ours"]
                        sets[way] = now.enter_context(started(way, count, options, url))
                    assert all(reader.greeting == "ready" for readers in sets.values() for reader in readers)
                    for number in range(-1, options.rounds):  # the first is for warming up
                        first = number % len(options.only)
                        for way in (*options.only[first:], *options.only[:first]):
                            server = bare if way.startswith("flight") else ours if way.startswith("remote") else None
                            record = turn(sets[way], server, options)
                            records += [{"way": way, "readers": count, "round": number} | record] if number >= 0 else []
                            progress.advance()
    return records


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians and ranges over rounds; the ratio to the bare way, round by round: to mmap for files, to the better flight else."""
    lines = []
    rates = {(r["way"], r["readers"], r["round"]): r["gigabytes_per_second"] for r in records}
    for way, readers in dict.fromkeys((r["way"], r["readers"]) for r in records):
        own = [r for r in records if (r["way"], r["readers"]) == (way, readers)]
        bases = ("mmap",) if way in ("mmap", "local", "handover") else ("flight", "flight4")
        ratios = []
        for record in own:
            base = [rates[key] for name in bases if (key := (name, readers, record["round"])) in rates]
            ratios += [record["gigabytes_per_second"] / max(base)] if base else []
        line: dict[str, Any] = {"way": way, "readers": readers}
        for name in ("gigabytes_per_second", "reader_cpu_seconds_per_gigabyte", "server_cpu_seconds_per_gigabyte"):
            values = [record[name] for record in own]
            line |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
        line |= {"ratio": statistics.median(ratios) if ratios else None}
        line |= {"ratio_range": [min(ratios), max(ratios)] if ratios else None}
        lines.append(line)
    return lines


def measure_amortisation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Three trainers of different speeds read an epoch each: what share of reads is spared, with a large and a small buffer."""
    found = []
    epoch, whole = options.rows // options.batch, options.rows * options.batch_bytes // options.batch
    for way in ("remote", "remote+any"):
        for share in (1.1, 0.25):
            sizes = argparse.Namespace(**vars(options) | {"buffer_bytes": int(whole * share)})
            with started("serve", 1, sizes) as (server,):
                url = f"flight://127.0.0.1:{server.greeting}/{SITE}"
                with started(way, len(SPEEDS), sizes, url) as trainers:
                    assert all(trainer.greeting == "ready" for trainer in trainers)
                    for trainer, speed in zip(trainers, SPEEDS, strict=True):
                        trainer.tell(f"{epoch} {options.pause / speed}")
                    seconds = [json.loads(trainer.hear())["seconds"] for trainer in trainers]
                server.tell("report")
                counts = json.loads(server.hear())["sites"][SITE]
            found.append({"way": way, "buffer_share": share, "seconds": seconds} | counts)
            say(f"  {way}, buffer {share:.0%} of an epoch: amortisation {counts['amortisation']:.2f}")
    return found


def rate_table(lines: list[dict[str, Any]], title: str) -> Table:
    """The summary for people."""
    table = Table("way", "readers", "GB/s", "range", "ratio", "range", "readers' CPU s/GB", "server's CPU s/GB", title=title)
    for line in lines:
        low, high = line["gigabytes_per_second_range"]
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}"
        spread = "-" if line["ratio_range"] is None else "{:.2f}-{:.2f}".format(*line["ratio_range"])
        cpu = [f"{line[f'{who}_cpu_seconds_per_gigabyte']:.2f}" for who in ("reader", "server")]
        rate = [f"{line['gigabytes_per_second']:.2f}", f"{low:.2f}-{high:.2f}"]
        table.add_row(line["way"], str(line["readers"]), *rate, ratio, spread, *cpu)
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: tuple(names.split(",")), default=WAYS, help=f"of {','.join(WAYS)}")
    parser.add_argument("--readers", type=lambda counts: [int(count) for count in counts.split(",")], default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1 << 18, help="rows of the site")
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=4096, help="rows in a batch; divides --chunk-rows")
    parser.add_argument("--chunk-rows", type=int, default=8192)
    parser.add_argument("--buffer-bytes", type=int, default=2 << 30)
    parser.add_argument("--bytes-per-turn", type=int, default=2 << 30, help="bytes that a reader reads in a round")
    parser.add_argument("--pause", type=float, default=0.02, help="between two batches of the fastest of three trainers [s]")
    parser.add_argument("--no-amortisation", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache" / "serving")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "serving" / "results")
    for name in ("--worker", "--url"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.d_in, options.batch, options.chunk_rows = 1 << 14, 256, 512, 1024
        options.bytes_per_turn, options.rounds, options.buffer_bytes, options.pause = 8 << 20, 2, 16 << 20, 0.001
    if unknown := set(options.only) - set(WAYS):
        parser.error(f"--only {','.join(sorted(unknown))}: no such way; there are {', '.join(WAYS)}")
    if options.chunk_rows % options.batch:
        parser.error(f"--batch {options.batch} does not divide --chunk-rows {options.chunk_rows}")
    options.batch_bytes = options.batch * options.d_in * CARRIER[options.dtype].itemsize
    return options


def main() -> None:
    """Measure what is asked for."""
    options = parse()
    if options.worker:
        (serve if options.worker.startswith("serve") else read)(options)
        return
    make_folder(options.out)
    console = Console() if sys.stdout.isatty() else Console(width=130)
    options.folder = activations(options)
    sizes = {name: value for name, value in vars(options).items() if name not in ("cache", "out", "folder", "worker", "url")}
    results: dict[str, Any] = {"device": device(), "command": shlex.join(sys.argv), "settings": sizes}
    results["versions"] = {"pyarrow": pa.__version__, "torch": torch.__version__, "numpy": np.__version__}
    records = measure_rates(options)
    results["rates"] = {"summary": summarise(records), "rounds": records}
    title = f"{options.dtype} [{options.rows}, {options.d_in}], warm; ratios to mmap or to the better bare Flight, round by round"
    console.print(rate_table(results["rates"]["summary"], title))
    if not options.no_amortisation:
        results["amortisation"] = measure_amortisation(options)
    write_json(options.out / "results.json", json.loads(json.dumps(results)))
    console.print(f"{device()['processor']}, {os.cpu_count()} cores; {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
