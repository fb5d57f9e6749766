"""Requests that nobody of good will sends: each is refused, and the server then still serves the right bits.

EVERYSCOPE_FUZZ sets how many requests: 10,000 where it says nothing.
"""

import json
import os
import random
import socket
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest
import torch
from serve_process import TOKEN, resident_bytes, start_server
from served_rows import CHUNK_ROWS, NUM_ROWS, SITES, row_ids, write_sites

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource

SITE = "resid_post/layer_0"
REQUESTS = int(os.environ.get("EVERYSCOPE_FUZZ", "10000"))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NAMES = [
    "../../etc/passwd",
    "..",
    "/etc/shadow",
    "resid_post/layer_0/..",
    "\x00",
    "%2e%2e%2f",
    "resid_post\\layer_0",
    "a" * 300,
    "ü",
]
NUMBERS = [-1, 0, 10, 11, 2**31, 2**48, 2**63, 2**64, 10**40, 1.5, True, None, "0", [], {}]


def value(rng: random.Random) -> object:
    kinds = [
        lambda: rng.choice(NAMES),
        lambda: rng.choice(NUMBERS),
        lambda: rng.randrange(-(2**70), 2**70),
        lambda: "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randrange(100))),
        lambda: [value(rng)],
        lambda: {rng.choice(NAMES): value(rng)},
    ]
    return rng.choice(kinds)()


def body(rng: random.Random, lease: str) -> bytes:
    """Anything from noise to a request that is nearly right."""
    shapes = [
        {"lease": lease, "chunk": 0},
        {"lease": lease, "epoch": 0, "ask": 1},
        {"protocol": 1, "site": SITE, "boot_id": None},
        {"trainer": "x", "site": SITE, "order": "any", "epoch": 0, "seen": ""},
        {},
    ]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 50, 1023, 1024, 1025, 5000]))
    if kind == 1:
        return b"[" * rng.choice([1, 500, 100_000])
    shape = dict(rng.choice(shapes))
    if kind == 2:
        shape[rng.choice([*shape, "path", "file", "__class__"])] = value(rng)
    if kind == 3 and shape:
        shape.pop(rng.choice(list(shape)))
        shape["more"] = value(rng)
    text = bytearray(json.dumps(shape).encode())
    if kind == 4:
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    if kind == 5:
        text = text[: rng.randrange(len(text))] + rng.randbytes(3)
    return bytes(text)


def by_flight(rng: random.Random, client: flight.FlightClient, lease: str, tokens: list[str]) -> str:
    """One call with a random method, body and token; the name of what came back."""
    given = rng.choice([TOKEN, TOKEN, TOKEN, *tokens])
    headers = [(b"authorization", given.encode())] if rng.random() < 0.1 else [(b"authorization", b"Bearer " + given.encode())]
    options = flight.FlightCallOptions(timeout=20, headers=headers if rng.random() > 0.05 else [])
    content = body(rng, lease)
    schema = pa.schema([("x", pa.int32())])
    name = rng.choice(["describe", "lease", "renew", "release", "counters", "metrics", "shutdown", "../x", "", "x" * 5000])
    calls = [
        lambda: client.do_get(flight.Ticket(content), options).read_all(),
        lambda: list(client.do_action(flight.Action(name, content), options)),
        lambda: list(client.do_action(flight.Action(name, content), options)),
        lambda: client.get_flight_info(flight.FlightDescriptor.for_path(rng.choice(NAMES)), options),
        lambda: client.get_schema(flight.FlightDescriptor.for_command(content), options),
        lambda: list(client.list_flights(content, options)),
        lambda: list(client.list_actions(options)),
        lambda: client.do_put(flight.FlightDescriptor.for_path("../x"), schema, options)[0].close(),
        lambda: client.do_exchange(flight.FlightDescriptor.for_command(content), options)[0].close(),
    ]
    try:
        rng.choice([*calls[:3], *calls[:3], *calls])()
    except Exception as error:
        return type(error).__name__
    return "answered"


def by_socket(rng: random.Random, port: int) -> None:
    """Bytes that are no gRPC, or nearly: half a handshake, frames of absurd length, noise, silence."""
    frame = struct.pack(">I", rng.randrange(2**24))[1:] + bytes([rng.randrange(12), rng.randrange(256)]) + rng.randbytes(4)
    sent = rng.choice(
        [
            b"",
            rng.randbytes(rng.randrange(1, 4000)),
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            PREFACE[: rng.randrange(len(PREFACE))],
            PREFACE + frame + rng.randbytes(rng.randrange(2000)),
            PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + frame * rng.randrange(1, 50),
        ]
    )
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(sent)
        if rng.random() < 0.3:
            connection.settimeout(0.02)
            connection.recv(1000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("served") / "shards")


def test_a_fuzzed_server_is_unharmed(shards, tmp_path):
    config = ServeConfig(
        shards=shards,
        listen="127.0.0.1:0",
        chunk_rows=CHUNK_ROWS,
        buffer_bytes=40 * CHUNK_ROWS * 6 * 4,
        wait_seconds=0.05,
        lease_seconds=5,
        log=tmp_path / "log.jsonl",
    )
    server = start_server(config, TOKEN)
    url, rng, came = f"flight://127.0.0.1:{server.port}/{SITE}", random.Random(0), Counter()
    try:
        with FlightSource(url, token=TOKEN, trainer="honest", use_files=False) as honest:
            honest.batch(0, 50)
            before = resident_bytes(server.process.pid)
            client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
            tokens = ["", "x", TOKEN[:-1], TOKEN + "0", "é" * 20, "A" * 4000]
            lease = honest._servers.links[0]._lease.lease
            for number in range(REQUESTS):
                if number % 4 == 3:
                    by_socket(rng, server.port)
                else:
                    came[by_flight(rng, client, rng.choice([lease, "unknown", "0" * 32]), tokens)] += 1
            huge = flight.FlightCallOptions(timeout=60, headers=[(b"authorization", b"Bearer " + TOKEN.encode())])
            for _ in range(3):
                with pytest.raises(flight.FlightError, match="are taken"):
                    client.do_get(flight.Ticket(b"x" * (32 << 20)), huge).read_all()
                with pytest.raises(flight.FlightError, match="are taken"):
                    list(client.do_action(flight.Action("lease", b"x" * (32 << 20)), huge))
            client.close()
            for site in SITES:
                local = LocalSource(shards / site)
                with FlightSource(url.replace(SITE, site), token=TOKEN, use_files=False) as after:
                    for step in range(20):
                        assert torch.equal(after.batch(step, 60), local.batch(step, 60))
            assert row_ids(honest.batch(0, NUM_ROWS)) == list(range(NUM_ROWS))
        assert server.process.poll() is None
        assert resident_bytes(server.process.pid) < before + (256 << 20)
        assert came["FlightUnauthenticatedError"] > REQUESTS / 20
        assert came["FlightServerError"] > REQUESTS / 10
        log = config.log.read_text()
        assert TOKEN not in log
        assert len(server.events("refused")) < REQUESTS / 5, "refusals are logged, but not each of a flood"
        assert server.events("refused")
    finally:
        server.process.kill()
        server.process.wait()
