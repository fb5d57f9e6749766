"""What a running server counts, shows, and does when it is asked to stop."""

import io
import json
import threading
import time

import numpy as np
import pyarrow.flight as flight
import pytest
from rich.console import Console
from served_rows import CHUNK_ROWS, D_IN, NUM_ROWS, row_ids

from everyscope.activations.serve.watch import watch
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.wire import BadRequest, Describe, LeaseRequest, Renew, Ticket, pack_seen, parse, unpack_seen
from everyscope.base.errors import StorageError

SITE = "resid_post/layer_0"


def act(port: int, name: str, body: bytes = b"{}") -> bytes:
    client = flight.FlightClient(f"grpc://127.0.0.1:{port}")
    try:
        return next(iter(client.do_action(flight.Action(name, body), flight.FlightCallOptions(timeout=20)))).body.to_pybytes()
    finally:
        client.close()


def test_counters_tell_what_was_read_and_served(start):
    server = start(buffer_bytes=1 << 20)
    url = f"flight://127.0.0.1:{server.port}/{SITE}"
    for name in ("first", "second"):
        with FlightSource(url, trainer=name, use_files=False, ahead=1) as source:
            for step in range(NUM_ROWS // CHUNK_ROWS):
                source.batch(step, CHUNK_ROWS)
    report = json.loads(act(server.port, "counters"))
    counts, size = report["sites"][SITE], CHUNK_ROWS * D_IN * 2
    assert (counts["bytes_read"], counts["bytes_served"], counts["amortisation"]) == (10 * size, 20 * size, 2.0)
    assert (counts["hits"], counts["misses"], counts["hit_rate"]) == (10, 10, 0.5)
    assert [(row["trainer"], row["chunks"], row["hits"]) for row in report["trainers"]] == [("first", 10, 0), ("second", 10, 10)]
    assert report["buffer"]["leases"] == 0, "closing gives leases back"
    text = act(server.port, "metrics").decode()
    assert f'everyscope_bytes_served_total{{site="{SITE}"}} {20 * size:g}\n' in text
    assert f'everyscope_trainer_bytes_total{{trainer="first",site="{SITE}"}} {10 * size:g}\n' in text
    names = [line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#")]
    assert all(f"# TYPE {name} " in text for name in names)


def test_watching_shows_every_server_also_one_that_is_away(start):
    server = start()
    with FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", trainer="somebody", use_files=False) as source:
        source.batch(0, 10)
        screen = io.StringIO()
        console = Console(file=screen, width=160)
        watch([f"127.0.0.1:{server.port}", "127.0.0.1:1"], is_once=True, console=console)
    assert "somebody" in screen.getvalue()
    assert SITE in screen.getvalue()
    assert "no answer" in screen.getvalue()


def test_a_server_that_drains_sends_what_is_under_way_and_takes_nothing_new(start, tmp_path):
    server = start(log=tmp_path / "log.jsonl")
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    wish = LeaseRequest(trainer="t", site=SITE, order="fixed", epoch=0).model_dump_json().encode()
    lease = json.loads(act(server.port, "lease", wish))["lease"]
    options = flight.FlightCallOptions(timeout=30)
    reader = client.do_get(flight.Ticket(json.dumps({"lease": lease, "chunk": 0}).encode()), options)
    reader.schema  # noqa: B018 the call is under way
    server.buffer.drain()
    with pytest.raises(flight.FlightUnavailableError, match="shutting down"):
        act(server.port, "lease", wish)
    with pytest.raises(flight.FlightUnavailableError, match="shutting down"):
        client.do_get(flight.Ticket(json.dumps({"lease": lease, "chunk": 1}).encode()), options).read_all()
    assert sum(len(part.data) for part in reader) == CHUNK_ROWS
    del reader
    client.close()
    assert server.drain()
    assert [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()][-2:] == ["drain", "stopped"]


def test_a_slow_trainer_keeps_its_lease(start, tmp_path):
    server = start(lease_seconds=0.3, log=tmp_path / "log.jsonl")
    with FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", trainer="slow", use_files=False, ahead=1) as source:
        source.batch(0, 10)
        time.sleep(1.0)  # longer than a lease: what is tested is time itself
        assert server.buffer.report()["buffer"]["leases"] == 1
        source.batch(5, 100)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events.count("lease") == 1
    assert "lapse" not in events


def test_a_lapsed_lease_is_taken_anew_in_silence(start, monkeypatch):
    monkeypatch.setattr("everyscope.activations.stream.flight._stay", lambda servers, pause: None)
    server = start(lease_seconds=0.2)
    with FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", use_files=False, ahead=1) as source:
        source.batch(0, 10)
        deadline = time.monotonic() + 20
        while server.buffer.report()["buffer"]["leases"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert row_ids(source.batch(5, 100)) == list(range(500, 600))


def test_a_request_waits_no_longer_than_the_server_allows(start):
    """All slots are pinned by a stalled trainer's calls, so another one's chunk cannot be read; it is told to ask again."""
    server = start(buffer_bytes=3 * CHUNK_ROWS * D_IN * 4, wait_seconds=0.2)
    buffer = server.buffer
    stalled = buffer.lease("stalled", SITE, False, 0, None, "stalled")
    parcels = [buffer.take(stalled.id, chunk, 0, 0, 5, lambda: False) for chunk in (0, 1)]
    with FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", use_files=False, ahead=1, deadline=0.5) as source:
        source.batch(5, 10)  # one slot is left
        other = buffer.take(source._servers.links[0]._lease.lease, 3, 0, 0, 5, lambda: False)  # and now none
        answers = []
        asking = threading.Thread(target=lambda: answers.append(source.batch(7, 100)))
        asking.start()
        asking.join(1.5)  # longer than the client's deadline: a server that says "wait" is not silent
        assert asking.is_alive()
        del other, parcels
        asking.join(20)
        assert row_ids(answers[0]) == list(range(700, 800))


def test_an_end_of_the_source_ends_its_waiting(start):
    server = start()
    source = FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", use_files=False, ahead=1)
    source.batch(0, 1)
    server.buffer.drain()
    errors = []

    def request() -> None:
        try:
            source.batch(7, 100)
        except StorageError as error:
            errors.append(error)

    asking = threading.Thread(target=request)
    asking.start()
    source.close()
    asking.join(20)
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Ticket, b""),
        (Ticket, b"[]"),
        (Ticket, b"{}"),
        (Ticket, b'{"lease": 5}'),
        (Ticket, b'{"lease": "x", "chunk": -1}'),
        (Ticket, b'{"lease": "x", "chunk": 1.5}'),
        (Ticket, b'{"lease": "x", "chunk": "1"}'),
        (Ticket, b'{"lease": "x", "path": "/etc/passwd"}'),
        (Ticket, b'{"lease": "' + b"x" * 65 + b'"}'),
        (Ticket, b'{"lease": "x", "ask": 9223372036854775808}'),
        (Ticket, b"\xff\xfe"),
        (Ticket, b'{"lease": "x"}' + b" " * 2000),
        (Describe, b'{"protocol": 1, "site": "' + b"../" * 100 + b'"}'),
        (LeaseRequest, b'{"trainer": "../../x", "site": "s", "order": "fixed", "epoch": 0}'),
        (LeaseRequest, b'{"trainer": "x\\n", "site": "s", "order": "fixed", "epoch": 0}'),
        (LeaseRequest, b'{"trainer": "x", "site": "s", "order": "random", "epoch": 0}'),
        (Renew, b'{"lease": null}'),
    ],
)
def test_requests_outside_the_vocabulary_are_refused(kind, body):
    with pytest.raises(BadRequest):
        parse(kind, body, 1024)


def test_seen_bits_travel_whole():
    for count in (0, 1, 7, 8, 9, 1000):
        seen = np.random.default_rng(count).random(count) < 0.5
        assert (unpack_seen(pack_seen(seen), count) == seen).all()
        with pytest.raises(BadRequest):
            unpack_seen(pack_seen(np.ones(count + 8, bool)), count)
    with pytest.raises(BadRequest):
        unpack_seen("%%", 8)
