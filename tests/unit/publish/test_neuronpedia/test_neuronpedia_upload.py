"""Sending an export to a server of our own on this machine, which fails in every way that it is told to.

It takes a body whole or not at all, and adds what comes twice a second time, as Neuronpedia's own does.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from everyscope.base.errors import ConfigError, DataError, StorageError
from everyscope.publish.neuronpedia import run as export
from everyscope.publish.neuronpedia.client import Client
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.sites.names import Site

KEY = "a-secret-key"
WAITS = {"retries": 4, "backoff_s": 0.0, "timeout_s": 5.0}
LOST, TAKEN_AND_LOST = "lost", "taken and lost"
"""An answer that never comes, for a body that was not taken, and for one that was."""


class Server:
    """Keeps what it takes; `plan` says how to fail, one entry a POST of features."""

    def __init__(self) -> None:
        self.taken: Counter[tuple[str, str, int]] = Counter()
        self.sets: list[str] = []
        self.posts: list[str] = []
        self.plan: list[Any] = []
        self.keys: set[str | None] = set()
        self.max_bytes = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.keys.add(self.headers["X-Api-Key"])
                _, _, _, model, source, index = self.path.split("/")
                is_there = (model, source, int(index)) in outer.taken
                self.answer(200, {"modelId": model, "layer": source, "index": index} if is_there else None)

            def do_POST(self) -> None:
                outer.keys.add(self.headers["X-Api-Key"])
                content = self.rfile.read(int(self.headers["Content-Length"]))
                body, route = json.loads(content), self.path.removeprefix("/api/")
                outer.posts.append(route)
                if route == "feature/upload-batch":
                    outer.max_bytes = max(outer.max_bytes, len(content))
                    self.features(body)
                elif body.get("name", body.get("id")) in outer.sets:
                    self.answer(400, {"error": "Source set name already exists for this model."})
                else:
                    outer.sets.append(body.get("name", body.get("id")))
                    self.answer(200, body)

            def features(self, body: dict[str, Any]) -> None:
                fate = outer.plan.pop(0) if outer.plan else 200
                if fate in (200, TAKEN_AND_LOST):
                    outer.taken.update((body["modelId"], body["source"], feature["index"]) for feature in body["features"])
                if fate in (LOST, TAKEN_AND_LOST):
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(fate, {"error": f"as planned, {self.headers['X-Api-Key']}"})

            def answer(self, code: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                if code == 429:
                    self.send_header("Retry-After", "0")
                if code == 302:
                    self.send_header("Location", "/api/elsewhere")
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.host = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    found = Server()
    yield found
    found.close()


@pytest.fixture
def wide(make_suite: Callable[..., Path]) -> Path:
    """A suite whose two SAEs for the API need three bodies each."""
    shape = {"width": 400, "l0": 9.0, "is_explained": False}
    return make_suite(*({"site": Site("resid_post", layer), **shape} for layer in (0, 1)), examples=1, window=2)


def config_of(suite: Path, server: Server, **fields: Any) -> NeuronpediaConfig:
    return NeuronpediaConfig(suite=suite, out=suite.parent / "out", **{"upload": True, "host": server.host, **WAITS, **fields})


def everything() -> Counter[tuple[str, str, int]]:
    """Every living latent of both SAEs, once."""
    sources = ("0-golden-scope-res-400", "1-golden-scope-res-400")
    return Counter(("some-model", source, latent) for source in sources for latent in range(400) if latent % 6 != 5)


def test_every_feature_arrives_once(wide: Path, server: Server):
    result = export.run(config_of(wide, server)).upload
    assert server.taken == everything()
    assert server.sets == ["golden-scope-res-400"]
    assert server.posts[0] == "source-set/new"
    assert server.keys == {KEY}
    assert result is not None
    assert (result.num_bodies, result.num_features, result.num_sent_before) == (6, 668, 0)
    told = export.run(config_of(wide, server))
    assert told.words.splitlines()[0].startswith("2 sources (2 finished before): 800 latents, 668 activations, 0 explanations")
    assert told.words.splitlines()[-1] == f"Sent 0 features in 0 bodies to {server.host}"
    again = told.upload
    assert again is not None
    assert (again.num_bodies, again.num_sent_before) == (0, 6)
    assert server.taken == everything()
    assert len(server.posts) == 7


@pytest.mark.parametrize(
    "plan",
    [
        [429, 429, 200],
        [500, 502, 503, 200],
        [LOST, 200],
        [TAKEN_AND_LOST],
        [200, TAKEN_AND_LOST, LOST, TAKEN_AND_LOST, 429, 504],
    ],
)
def test_no_failure_loses_or_doubles_a_feature(wide: Path, server: Server, plan: list[Any]):
    server.plan = plan
    export.run(config_of(wide, server))
    assert server.taken == everything()


@pytest.mark.parametrize("last", [500, LOST, TAKEN_AND_LOST, 429])
def test_an_upload_that_gave_up_is_resumed(wide: Path, server: Server, last: Any):
    server.plan = [200, 200, last]
    with pytest.raises(StorageError, match="not reached in 1 attempts"):
        export.run(config_of(wide, server, retries=0))
    assert len(server.taken) < len(everything())
    export.run(config_of(wide, server))
    assert server.taken == everything()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_upload_is_resumed(wide: Path, server: Server, when: str, monkeypatch: pytest.MonkeyPatch):
    original, count = Client.post, [0]

    def dies(self: Client, route: str, body: bytes, is_there: Any = None) -> Any:
        count[0] += 1
        if count[0] == 4 and when == "before":
            raise KeyboardInterrupt
        answer = original(self, route, body, is_there)
        if count[0] == 4:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(Client, "post", dies)
    with pytest.raises(KeyboardInterrupt):
        export.run(config_of(wide, server))
    journal = wide.parent / "out/upload/sent.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"host": "cut sho')
    monkeypatch.setattr(Client, "post", original)
    export.run(config_of(wide, server))
    assert server.taken == everything()
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_dry_run_needs_no_key_and_sends_nothing(
    wide: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    result = export.run(config_of(wide, server, dry_run=True)).upload
    assert result is not None
    assert result.is_dry
    assert (result.num_bodies, result.num_features) == (6, 668)
    assert not server.posts
    assert not (wide.parent / "out/upload/sent.jsonl").exists()
    said = capsys.readouterr().err
    assert "source-set/new" in said
    assert "0-golden-scope-res-400: 3 bodies, 334 features" in said


def test_each_host_has_its_own_account(wide: Path, server: Server):
    other = Server()
    try:
        export.run(config_of(wide, server))
        export.run(config_of(wide, other))
        assert server.taken == other.taken == everything()
    finally:
        other.close()


def test_a_model_is_made_known_first_where_asked(wide: Path, server: Server):
    export.run(config_of(wide, server, create_model=True))
    assert server.posts[:2] == ["model/new", "source-set/new"]
    assert server.sets == ["some-model", "golden-scope-res-400"]


def test_what_is_refused_is_one_clear_error(wide: Path, server: Server):
    server.plan = [401]
    with pytest.raises(ConfigError, match="refuses the key"):
        export.run(config_of(wide, server))
    server.plan = [400]
    with pytest.raises(DataError, match=r"HTTP 400: as planned, …"):
        export.run(config_of(wide, server))
    assert not server.taken
    server.plan = [302]
    with pytest.raises(DataError, match="HTTP 302"):
        export.run(config_of(wide, server))
    assert "elsewhere" not in server.posts
    export.run(config_of(wide, server))
    assert server.taken == everything()


def test_the_key_stays_in_the_environment(wide: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    export.run(config_of(wide, server))
    assert not [path for path in (wide.parent / "out").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    with pytest.raises(ConfigError, match="clear text"):
        export.run(config_of(wide, server, host="http://192.0.2.1"))
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    with pytest.raises(ConfigError, match="NEURONPEDIA_API_KEY: is not set"):
        export.run(config_of(wide, server))


def test_changed_bodies_are_not_sent_beside_the_old(suite: Path, server: Server):
    export.run(config_of(suite, server))
    before = server.taken.copy()
    with pytest.raises(DataError, match=r"was sent to .* with other content"):
        export.run(config_of(suite, server, explanation_type="some-method"))
    assert server.taken == before
    assert set(before.values()) == {1}
    export.run(config_of(suite, server, explanation_type="some-method", set="renamed"))
    assert set(server.taken.values()) == {1}
    assert len(server.taken) == 2 * len(before)


def test_two_uploads_at_once_are_refused(wide: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    original, complaints = Client.post, []

    def meanwhile(self: Client, route: str, body: bytes, is_there: Any = None) -> Any:
        if not complaints:
            complaints.append("")
            try:
                export.run(config_of(wide, server))
            except ConfigError as error:
                complaints.append(str(error))
        return original(self, route, body, is_there)

    monkeypatch.setattr(Client, "post", meanwhile)
    export.run(config_of(wide, server))
    assert "another upload of this folder is running" in complaints[1]
    assert server.taken == everything()


def test_waits_grow_and_heed_the_host(wide: Path, server: Server):
    waits: list[float] = []
    client = Client(config_of(wide, server, retries=3, backoff_s=2.0), waits.append)
    server.plan = [500, 500, 500, 200]
    client.post("feature/upload-batch", b'{"modelId": "m", "source": "s", "features": []}')
    server.plan = [429, 200]
    client.post("feature/upload-batch", b'{"modelId": "m", "source": "s", "features": []}')
    assert waits == [2, 4, 8, 0]
