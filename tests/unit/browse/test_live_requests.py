"""The language model works for this server's own pages alone, for a few at a time, and no longer than somebody waits."""

import asyncio
import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvicorn
from browser.asking import Answer, FakeLive, ask

from everyscope.base.errors import EveryscopeError
from everyscope.browse import live as live_module
from everyscope.browse.app import Browser
from everyscope.browse.live import MAX_ASKED, Busy, LiveModel, Stopped
from everyscope.browse.patience import Patient
from everyscope.browse.preparation import Preparation
from everyscope.browse.run import listen
from everyscope.browse.views.steer import Shown

SAE = "resid_post/layer_1/width_256/average_l0_11"
OWN, FOREIGN = "http://127.0.0.1:8017", "http://evil.example"


class SlowLive(FakeLive):
    """Steers until it is told to stop, or is let go, perhaps behind a first token."""

    def __init__(self, first: tuple[bytes, ...] | None = None) -> None:
        super().__init__()
        self.first = first
        self.begun, self.free, self.was_stopped = threading.Semaphore(0), threading.Event(), threading.Event()

    def write(self, prompt, columns, *, num_tokens, temperature, seed, each=lambda step: None, stop=lambda: False):
        self.begun.release()
        if self.first is not None:
            each(self.first)
        while not self.free.wait(0.01):
            if stop():
                self.was_stopped.set()
                raise Stopped("stopped")
        return super().write(prompt, columns, num_tokens=num_tokens, temperature=temperature, seed=seed)


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-origin", "origin": OWN}, True),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, True),
        ({"origin": OWN, "referer": f"{OWN}/steer"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "origin": OWN}, False),
        ({"sec-fetch-site": "same-origin", "origin": FOREIGN}, False),
        ({"origin": FOREIGN}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"referer": f"{FOREIGN}/page"}, False),
    ],
)
@pytest.mark.parametrize("path", ["/steer", "/text", "/text/pane", f"/sae/{SAE}/3/try"])
def test_another_sites_page_makes_no_model_work(get: Callable, path: str, headers: dict[str, str], is_own: bool):
    made: list[FakeLive] = []

    def factory() -> FakeLive:
        made.append(FakeLive())
        return made[-1]

    field = "prompt" if path == "/steer" else "text"
    assert get("/steer?prompt=a&start=1", factory, headers=headers).status == (200 if is_own else 403)
    for answer in (
        get(f"{path}?{field}=a", factory, headers=headers),
        get(path, factory, headers=headers, form=f"{field}=a".encode()),
    ):
        assert answer.status == (200 if is_own else 403)
    streamed = get("/steer/stream", factory, headers=headers, form=b"prompt=a&tokens=2")
    assert streamed.status == (200 if is_own else 403)
    assert len(made) == (3 if is_own else 0)
    assert get(path, factory, headers=headers).status == 200  # the page itself computes nothing, and may be linked to


def test_a_form_may_be_longer_than_an_address(get: Callable):
    text = "é" * 4000
    live = FakeLive()
    answer = get("/text", lambda: live, form=("text=" + "%C3%A9" * 4000).encode())
    assert answer.status == 200
    assert live.asked[0][0] == text
    for form, kind in ((b"text=" + b"a" * (1 << 16), None), (b"&".join([b"a=1"] * 100), None), (b"{}", "application/json")):
        answer = get("/text", FakeLive, form=form, headers={} if kind is None else {"content-type": kind})
        assert answer.status == 422


@pytest.mark.parametrize(
    "query",
    [
        "temperature=1e-300",
        "temperature=1e-40",
        "temperature=nan",
        "temperature=inf",
        "latent=" + "9" * 5000,
        "latent=%C2%B2",
        "latent=-1",
        "tokens=1e400",
        "tokens=0",
        "seed=99999999999999999999",
        "seed=-1",
        "latent=1&strength=1e400",
        "latent=1&sae=%00",
    ],
)
def test_odd_numbers_are_told_and_are_no_fault_of_ours(get: Callable, query: str):
    live = FakeLive()
    assert get(f"/steer?prompt=a&{query}", lambda: live).status == 422
    assert get("/steer/stream", lambda: live, form=f"prompt=a&{query}".encode()).status == 422
    assert not live.written


@pytest.mark.parametrize("query", ["page=" + "9" * 5000, "page=-1", "page=1e9", f"token={'9' * 5000}", "sort=%00&order=%FF"])
def test_odd_tables_are_pages(get: Callable, query: str):
    assert get(f"/sae/resid_post/layer_1/width_256/average_l0_11/?{query}").status in (200, 422)


def test_a_latent_of_five_thousand_digits_is_a_page_that_says_no(get: Callable):
    assert get(f"/sae/resid_post/layer_1/width_256/average_l0_11/{'9' * 5000}").status in (404, 422)


STREAM = {"address": "/steer/stream", "form": b"prompt=a&tokens=2"}


def lines(answer: Answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-1]]


def test_a_stream_has_every_token_and_then_the_page_of_its_address(get: Callable):
    live = FakeLive()
    query = f"prompt=a%20b&sae={SAE}&latent=3&strength=1&tokens=3&seed=5&sweep=1"
    *steps, last = lines(get("/steer/stream", lambda: live, form=query.encode()))
    assert steps[0]["titles"] == ["−0.5×", "as it is", "+0.25×", "+0.5×", "+1×"]
    shown = ["".join(text for step in steps for _, text in step["parts"][column]) for column in range(5)]
    assert shown[1] == " word0 word1 word2"
    assert shown[0] == shown[2] == shown[4] == " <i>pushed</i>↵" * 3
    page = get(f"/steer?{query}", lambda: live)
    assert last["html"].strip() in page.text
    assert live.written[0] == live.written[1]
    assert "<i>pushed</i>" not in last["html"]


def test_halves_of_characters_wait_for_one_another():
    shown = Shown(2)
    steps = [shown.add(step)["parts"] for step in ((b"\xe2\x82", b"\xff"), (b"\xac", b"a"), (None, b"\xe2"), (None, None))]
    assert steps == [[[], [("mark", "⟨FF⟩")]], [[("", "€")], [("", "a")]], [[], []], [[], [("mark", "⟨E2⟩")]]]


@pytest.mark.parametrize("more", [STREAM, {"address": "/steer?prompt=a"}])
def test_only_a_few_wait_and_the_others_are_told_at_once(suite: Path, cache: Path, more: dict):
    preparation = Preparation(suite, cache)
    preparation.run()
    live = SlowLive()
    app = Browser(preparation, lambda: live).app()
    answers: queue.Queue[Answer] = queue.Queue()
    threads = [threading.Thread(target=lambda: answers.put(ask(app, **more))) for _ in range(MAX_ASKED + 1)]
    for thread in threads:
        thread.start()
    refused = answers.get(timeout=60)  # whichever comes last, while all others wait
    assert refused.status == 503
    assert refused.headers["retry-after"]
    assert ask(app, "/").status == 200  # no other page waits for the model
    live.free.set()
    for thread in threads:
        thread.join()
    assert [answers.get().status for _ in range(MAX_ASKED)] == [200] * MAX_ASKED


@pytest.mark.parametrize("more", [STREAM, {"address": "/steer?prompt=a"}])
def test_work_ends_when_the_client_has_left(suite: Path, cache: Path, more: dict):
    preparation = Preparation(suite, cache)
    preparation.run()
    live = SlowLive()
    app = Browser(preparation, lambda: live).app()
    asked = 0

    async def leave() -> dict:
        nonlocal asked
        asked += 1
        body = {"type": "http.request", "body": more.get("form", b""), "more_body": False}
        return body if asked == 1 else {"type": "http.disconnect"}

    assert ask(app, receive=leave, **more).status == 503
    assert live.was_stopped.is_set()


def test_a_stream_whose_client_leaves_half_way_ends_the_work(suite: Path, cache: Path):
    preparation = Preparation(suite, cache)
    preparation.run()
    live = SlowLive(first=(b"a", b"b"))
    app = Browser(preparation, lambda: live).app()
    asked = 0

    async def leave() -> dict:
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "http.request", "body": STREAM["form"], "more_body": False}
        while not live.begun.acquire(blocking=False):
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    answer = ask(app, receive=leave, **STREAM)
    assert answer.status == 200
    assert len(lines(answer)) <= 1
    assert live.was_stopped.wait(10)


def test_a_stream_that_takes_too_long_says_so_behind_its_tokens(get: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live_module, "MAX_SECONDS", 0.05)
    first, last = lines(get(live=lambda: SlowLive(first=(b"a", b"b")), **STREAM))
    assert first["parts"] == [[["", "a"]], [["", "b"]]]
    assert last == {"error": "stopped"}


def test_a_stream_comes_token_by_token_over_a_network(suite: Path, cache: Path):
    """Through uvicorn and all middleware, to a browser that would take it compressed."""
    preparation = Preparation(suite, cache)
    preparation.run()
    live = SlowLive(first=(b"a", b"b"))
    server = uvicorn.Server(uvicorn.Config(Browser(preparation, lambda: live).app(), log_level="error", lifespan="off"))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=60) as connection:
                head = (
                    "POST /steer/stream HTTP/1.1\r\nhost: localhost\r\naccept-encoding: gzip\r\n"
                    f"content-type: application/x-www-form-urlencoded\r\ncontent-length: {len(STREAM['form'])}\r\n\r\n"
                )
                connection.sendall(head.encode() + STREAM["form"])
                seen = b""
                while b"data: " not in seen:
                    seen += connection.recv(65536)
                assert not live.free.is_set()  # the model still writes
            assert live.was_stopped.wait(20)  # and no more, once the browser has hung up
        finally:
            live.free.set()
            server.should_exit = True
            thread.join()


def test_work_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live_module, "MAX_SECONDS", 0.05)
    live = SlowLive()
    model = LiveModel(lambda: live)
    with pytest.raises(Stopped):
        model.asking().write("a", [[]], num_tokens=1, temperature=0, seed=0)
    assert live.was_stopped.is_set()
    given_up = model.asking()
    given_up.give_up()
    with pytest.raises(Stopped):
        given_up.read("a", [])
    assert not live.asked
    model.close()
    assert issubclass(Busy, EveryscopeError)


def test_whatever_ends_the_index_the_pages_say_so(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*given) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("everyscope.browse.preparation.build_sae", fail)
    preparation = Preparation(suite, tmp_path)
    preparation.start().join()
    app = Browser(preparation, None).app()
    for address, status in (("/", 200), (f"/sae/{preparation.index.saes[0].folder}/0", 500)):
        answer = ask(app, address)
        assert (answer.status, "MemoryError" in answer.text) == (status, status == 500)


SERVE = """
import sys, everyscope.browse.patience as patience
patience.Patient.head_seconds = 0.3
from pathlib import Path
from everyscope.browse.config import BrowseConfig
from everyscope.browse.run import run
run(BrowseConfig(suite=Path(sys.argv[1]), cache=Path(sys.argv[2]), port=0, open=False))
"""


def test_a_head_that_never_ends_is_not_waited_for(suite: Path, cache: Path, index: object):
    assert Patient.head_seconds == 10
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(suite), str(cache)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().rstrip().rstrip("/").rpartition(":")[2])
        for start in (b"", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: "):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(start)
                assert connection.recv(1) == b""  # hung up, where uvicorn alone would wait for ever
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET /state HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["is_ready"]
    finally:
        process.kill()
        process.wait()
