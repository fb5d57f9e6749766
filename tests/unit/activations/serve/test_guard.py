"""Who may listen where and who may ask."""

import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.flight as flight
import pytest
from pydantic import ValidationError
from served_rows import LARGEST_CHUNK, row_ids

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.guard import RefusalLog, read_token, require_safe, resolves_to_loopback
from everyscope.activations.serve.origin import ShardOrigin
from everyscope.activations.serve.run import serving
from everyscope.activations.stream.flight import FlightSource
from everyscope.base.errors import ConfigError, DataError, StorageError

TOKEN = "a-token-for-tests-only-0123456789"
SITE = "resid_post/layer_0"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(
        [*command.split(), *names, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.1.2.3", False)],
)
def test_loopback_is_this_host_alone(host, is_here):
    assert resolves_to_loopback(host) == is_here


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.1.2.3:8815"])
def test_other_addresses_need_token_and_tls(shards, listen, tmp_path):
    tls = {"tls_certificate": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    bare, with_tls = ServeConfig(shards=shards, listen=listen), ServeConfig(shards=shards, listen=listen, **tls)
    for config, token in ((bare, None), (bare, TOKEN), (with_tls, None)):
        with pytest.raises(ConfigError, match="other machines could connect"):
            require_safe(config, token)
    require_safe(with_tls, TOKEN)


def test_an_unsafe_server_never_listens(shards, monkeypatch):
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    config = ServeConfig(shards=shards, listen="0.0.0.0:0", chunk_rows=100)
    with pytest.raises(ConfigError, match="a token and TLS is missing"), serving(config, ShardOrigin(shards, 100)):
        pass


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("EVERYSCOPE_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    path = tmp_path / "token"
    path.write_text(TOKEN[::-1] + "\n")
    assert read_token(path) == TOKEN[::-1]
    for bad in ("", "short", "x" * 15, "sixteen letters with spaces", "ü" * 20):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="expected a token"):
            read_token(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "nowhere")


def test_only_the_token_opens(start, tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    log = tmp_path / "log.jsonl"
    server = start(token_file=path, log=log)
    url = f"flight://127.0.0.1:{server.port}/{SITE}"
    for wrong in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        with pytest.raises(ConfigError, match="the token was refused"):
            FlightSource(url, token=wrong, deadline=1)
    with FlightSource(url, token=TOKEN, use_files=False) as source:
        assert row_ids(source.batch(0, 3)) == [0, 1, 2]
    monkeypatch.setenv("EVERYSCOPE_TOKEN", TOKEN)
    with FlightSource(url, use_files=False) as source:
        assert row_ids(source.batch(1, 3)) == [3, 4, 5]
    assert server.buffer.report()["refusals"]["token"] == 6  # a lease that ended while it was renewed may be refused beside them
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "refused"]
    assert refused, "the first is logged at once, and those of the same second are counted in the next line"
    assert len(refused) + sum(line["not_logged_before"] for line in refused) <= 6
    assert TOKEN not in log.read_text()
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    twice = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())] * 2)
    with pytest.raises(flight.FlightUnauthenticatedError):
        list(client.do_action(flight.Action("counters", b"{}"), twice))
    client.close()


def test_tls_serves_those_who_trust_it_and_nobody_in_clear_text(start, certificate):
    chain, key = certificate
    server = start(tls_certificate=chain, tls_key=key)
    with FlightSource(f"flight+tls://127.0.0.1:{server.port}/{SITE}", roots=chain, use_files=False) as source:
        assert row_ids(source.batch(0, 3)) == [0, 1, 2]
    with pytest.raises(StorageError, match="no answer"):
        FlightSource(f"flight://127.0.0.1:{server.port}/{SITE}", deadline=0.3)
    with pytest.raises(StorageError, match="no answer"):
        FlightSource(f"flight+tls://127.0.0.1:{server.port}/{SITE}", deadline=0.3)
    with FlightSource(f"flight+tls://localhost:{server.port}/{SITE}", roots=chain, use_files=False) as source:
        assert row_ids(source.batch(0, 3)) == [0, 1, 2]


def test_a_taken_port_and_a_bad_certificate_are_one_error(start, shards, tmp_path):
    port = start().port
    config = ServeConfig(shards=shards, listen=f"127.0.0.1:{port}", chunk_rows=100)
    with pytest.raises(ConfigError, match="cannot listen there"), serving(config, ShardOrigin(shards, 100)):
        pass
    (tmp_path / "x.pem").write_text("no certificate")
    config = ServeConfig(shards=shards, listen="127.0.0.1:0", tls_certificate=tmp_path / "x.pem", tls_key=tmp_path / "x.pem")
    with pytest.raises(ConfigError, match="is not PEM"), serving(config, ShardOrigin(shards, 100)):
        pass


def test_refusals_do_not_fill_a_log():
    lines = []
    log = RefusalLog(lambda what, **details: lines.append(details))
    for _ in range(1000):
        log.note("token", "peer", "x" * 10_000)
    assert len(lines) < 5
    assert all(len(line["message"]) <= 200 for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        {"listen": "nowhere"},
        {"listen": "host:99999"},
        {"slice": "2/2"},
        {"slice": "-1/2"},
        {"slice": "a"},
        {"tls_key": Path("k")},
        {"token": "secret"},
        {"chunk_rows": 0},
    ],
)
def test_configs_that_cannot_be_meant_are_refused(change):
    with pytest.raises(ValidationError):
        ServeConfig(shards=Path("x"), **change)


def test_a_buffer_too_small_to_begin_is_refused_with_the_size_it_needs(start, shards, tmp_path):
    with pytest.raises(ConfigError, match=f"buffer_bytes={3 * LARGEST_CHUNK} or more"):
        start(buffer_bytes=3 * LARGEST_CHUNK - 1)
    start(buffer_bytes=3 * LARGEST_CHUNK)
    with pytest.raises(DataError, match="no finished shards"):
        start(shards=tmp_path)
