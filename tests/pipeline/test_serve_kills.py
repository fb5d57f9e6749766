"""Servers and trainers in processes of their own: killed with -9, restarted, cut off, stalled; no row is lost or seen twice."""

import json
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from serve_process import PATIENCE, ServerProcess, resident_bytes, spawn, start_server, wait_until
from served_rows import CHUNK_ROWS, D_IN, NUM_ROWS, SITES, row_ids, write_site, write_sites

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.activations.stream.sliced import SlicedSource
from everyscope.activations.stream.source import Source
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import fold
from everyscope.train.run import fit
from everyscope.train.training_group import TrainingGroup

SITE = "resid_post/layer_0"
ROWS = 30
"""Rows in a batch [rows]."""
TRAINER = """
import json, sys, time
from pathlib import Path
from everyscope.activations.stream.flight import FlightSource
url, order, name, out, steps, rows, pause = sys.argv[1:]
lines = Path(out)
lines.touch()
whole = lines.read_bytes().rpartition(b"\\n")[0]
done = len(whole.splitlines())
with lines.open("r+b") as log:
    log.truncate(len(whole) + (1 if whole else 0))
    log.seek(0, 2)
    journal = Path(out + ".journal") if order == "any" else None
    with FlightSource(url, order=order, journal=journal, trainer=name, use_files=False, deadline=50, call_seconds=3) as source:
        for step in range(max(0, done - 3), int(steps)):  # as from a checkpoint some steps ago
            batch = source.batch(step, int(rows))
            ids = (batch[:, 0] * 100 + batch[:, 1]).long().tolist()
            if step < done:
                assert json.loads(whole.splitlines()[step]) == ids, f"step {step} came out differently the second time"
                continue
            log.write((json.dumps(ids) + "\\n").encode())
            log.flush()
            time.sleep(float(pause))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("served") / "shards")


@pytest.fixture
def ending():
    with ExitStack() as stack:
        yield stack


def server(shards: Path, tmp_path: Path, ending: ExitStack, slice: str = "0/1", **changes) -> ServerProcess:
    fields = {
        "shards": shards,
        "listen": "127.0.0.1:0",
        "slice": slice,
        "chunk_rows": CHUNK_ROWS,
        "buffer_bytes": 6 * CHUNK_ROWS * D_IN * 4,
        "wait_seconds": 0.5,
        "log": tmp_path / f"server_{slice.replace('/', '_')}.jsonl",
    }
    started = start_server(ServeConfig(**(fields | changes)))
    ending.callback(end, started.process)
    return started


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()


@pytest.mark.parametrize(("order", "slices"), [("fixed", 2), ("any", 2)])
def test_trainers_and_servers_killed_at_random_lose_and_repeat_nothing(shards, tmp_path, ending, order, slices):
    """EVERYSCOPE_KILLS=8 for more of them; each costs the start of an interpreter or two."""
    rng, steps = random.Random(slices), -(-2 * NUM_ROWS // ROWS)
    kills = int(os.environ.get("EVERYSCOPE_KILLS", "2"))
    servers = [server(shards, tmp_path, ending, f"{index}/{slices}") for index in range(slices)]
    url = f"flight://{','.join(f'127.0.0.1:{one.port}' for one in servers)}/{SITE}"
    pauses = {"fast": 0.005, "half": 0.02, "slow": 0.05}

    def train(name: str) -> subprocess.Popen[bytes]:
        child = spawn(TRAINER, url, order, name, str(tmp_path / name), str(steps), str(ROWS), str(pauses[name]))
        ending.callback(end, child)
        return child

    def lines(name: str) -> int:
        path = tmp_path / name
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def kill(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    children = {name: train(name) for name in pauses}
    for number in range(kills):
        after = (number + 1) * steps // (kills + 2)
        wait_until(lambda after=after: lines("slow") >= after or children["slow"].poll() is not None, f"{after} steps")
        if number % 2:
            index = number // 2 % slices
            kill(servers[index].process)
            if rng.random() < 0.5:  # both at once
                kill(children["slow"])
                children["slow"] = train("slow")
            servers[index] = servers[index].again()
            ending.callback(end, servers[index].process)
        else:
            victim = rng.choice(list(pauses))
            kill(children[victim])
            children[victim] = train(victim)
    for child in children.values():
        assert child.wait(2 * PATIENCE) == 0
    local = SlicedSource(shards / SITE, CHUNK_ROWS, slices)
    for name in pauses:
        batches = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        seen = [row for batch in batches for row in batch]
        for epoch in range(2):
            assert Counter(seen[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]) == Counter(range(NUM_ROWS)), name
        if order == "fixed":
            assert batches == [row_ids(local.batch(step, ROWS)) for step in range(steps)]


class Proxy:
    """Carries bytes between 127.0.0.2 and a server; while it is cut, it carries none and takes no connection."""

    def __init__(self, port: int) -> None:
        self.target, self.is_cut, self.is_closed = port, threading.Event(), False
        self.listener = socket.create_server(("127.0.0.2", 0))
        self.port = self.listener.getsockname()[1]
        self.carried = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.is_closed:
            with suppress(OSError):
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, suppress(OSError):
            while not self.is_closed:
                if self.is_cut.is_set():  # a cable out: nobody hears anything, not even that the line is dead
                    time.sleep(0.01)
                    continue
                for end_ in select.select([near, far], [], [], 0.05)[0]:
                    data = end_.recv(1 << 16)
                    if not data:
                        return
                    (far if end_ is near else near).sendall(data)
                    self.carried += len(data)

    def close(self) -> None:
        self.is_closed = True
        self.listener.close()


@pytest.mark.parametrize("order", ["fixed", "any"])
def test_a_cut_link_is_waited_for_and_training_goes_on(shards, tmp_path, ending, order):
    """EVERYSCOPE_CUT_SECONDS=30 for the full length."""
    seconds = float(os.environ.get("EVERYSCOPE_CUT_SECONDS", "2"))
    proxy = Proxy(server(shards, tmp_path, ending).port)
    ending.callback(proxy.close)
    journal = tmp_path / "journal" if order == "any" else None
    url = f"flight://127.0.0.2:{proxy.port}/{SITE}"
    with FlightSource(
        url, order=order, journal=journal, use_files=False, ahead=2, call_seconds=1, deadline=seconds + 40
    ) as source:
        seen = row_ids(source.batch(0, CHUNK_ROWS))
        proxy.is_cut.set()
        threading.Timer(seconds, proxy.is_cut.clear).start()
        start, carried = time.monotonic(), proxy.carried
        for step in range(1, 4):  # more than what is on its way
            seen += row_ids(source.batch(step, CHUNK_ROWS))
        assert time.monotonic() - start > 0.9 * seconds
        assert proxy.carried > carried
        for step in range(4, 11):
            seen += row_ids(source.batch(step, CHUNK_ROWS))
    assert Counter(seen[:NUM_ROWS]) == Counter(range(NUM_ROWS))


def test_memory_stays_bounded_while_a_client_stalls(tmp_path, ending):
    """EVERYSCOPE_STALL_SECONDS=60 for the full length. The stalled client is stopped in the midst of its calls."""
    seconds = float(os.environ.get("EVERYSCOPE_STALL_SECONDS", "3"))
    site, d_in, chunk_rows = "mlp_out/layer_1", 512, 2048
    write_site(tmp_path / "wide" / site, site, sizes=(20_000, 20_000), d_in=d_in)
    chunk = chunk_rows * d_in * 4
    started = server(tmp_path / "wide", tmp_path, ending, chunk_rows=chunk_rows, buffer_bytes=6 * chunk)
    pid, url = started.process.pid, f"flight://127.0.0.1:{started.port}/{site}"
    with FlightSource(url, use_files=False) as source:
        stalled = spawn(TRAINER, url, "fixed", "stalled", str(tmp_path / "stalled"), "10000", "4096", "0")
        ending.callback(end, stalled)
        wait_until(lambda: (tmp_path / "stalled").exists() and (tmp_path / "stalled").stat().st_size > 50_000, "some steps")
        for step in range(40):  # every chunk, and both clients at work: the buffer and what Arrow keeps for them are as they stay
            source.batch(step, 1024)
        at_work = resident_bytes(pid)
        stalled.send_signal(signal.SIGSTOP)
        until, step, peak = time.monotonic() + seconds, 0, 0
        while time.monotonic() < until:
            source.batch(step, 1024)
            step += 1
            peak = max(peak, resident_bytes(pid))
    assert step > 5, "the others go on"
    assert peak < at_work + 6 * chunk + (64 << 20), f"{at_work} at work, {peak} while a client stalled"


def trained(source: Source) -> list[torch.Tensor]:
    """Folded SAEs of a small training group after some steps, as tensors."""
    preset = SaePreset(
        learning_rate=5e-3, learning_rate_warmup_steps=5, sparsity_warmup_steps=10, bandwidth=0.1, initial_threshold=0.1
    )
    configs = [SaeConfig(width=width, sparsity_coefficient=1e-2, preset=preset) for width in (16, 24)]
    group = TrainingGroup(configs, source.d_in, Normalisation(source.statistics.scale), steps=60)
    fit(group, source, 48, [])
    return [tensor for sae in group.saes for tensor in fold(sae, group.normalisation).tensors().values()]


@pytest.mark.parametrize("site", SITES)
def test_weights_trained_from_a_server_equal_those_of_a_local_run(shards, tmp_path, ending, site):
    torch.set_num_threads(1)
    started = server(shards, tmp_path, ending)
    with FlightSource(f"flight://127.0.0.1:{started.port}/{site}", use_files=False) as source:
        remote = trained(source)
    local = trained(LocalSource(shards / site))
    assert len(local) >= 10
    assert all(torch.equal(one, other) for one, other in zip(remote, local, strict=True))


def test_sigterm_ends_a_server_in_order(shards, tmp_path, ending):
    started = server(shards, tmp_path, ending)
    with FlightSource(f"flight://127.0.0.1:{started.port}/{SITE}", use_files=False) as source:
        source.batch(0, 10)
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert started.events("stopped")[0]["is_whole"]
