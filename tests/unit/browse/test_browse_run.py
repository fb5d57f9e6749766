"""The server as a process: on 127.0.0.1 alone, gone with Ctrl-C, and a language model that works in a thread of its own."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import pytest
from browser.asking import FakeLive

from everyscope.base.errors import ConfigError, ModelError
from everyscope.browse import run as run_module
from everyscope.browse.live import LiveModel, Reading, SaeQuestion
from everyscope.browse.queries import Index

pytestmark = pytest.mark.usefixtures("forked_interpreters")
SERVE = """
import sys
from pathlib import Path
from everyscope.browse.config import BrowseConfig
from everyscope.browse.run import run
run(BrowseConfig(suite=Path(sys.argv[1]), cache=Path(sys.argv[2]), port=0, open=False))
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_server_starts_answers_and_ends(suite: Path, cache: Path, index: Index, sign: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(suite), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line).group()
        with urlopen(address) as answer:
            assert b"Invented scope" in answer.read()
    finally:
        process.send_signal(sign)
        _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert process.returncode == (0 if sign is signal.SIGINT else -signal.SIGTERM)


def test_a_server_listens_to_this_machine_alone_and_finds_a_port():
    with run_module.listen(0) as first:
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(ConfigError, match=f"port {port}.*--port"):
            run_module.listen(port)
    with run_module.listen(None) as one, run_module.listen(None) as other:
        assert one.getsockname()[1] != other.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", one.getsockname()[1]), timeout=1)


def test_a_model_is_made_once_in_its_own_thread():
    made: list[str] = []

    class Threaded(FakeLive):
        def __init__(self) -> None:
            super().__init__()
            made.append(threading.current_thread().name)

        def read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
            made.append(threading.current_thread().name)
            return super().read(text, questions)

    model = LiveModel(Threaded)
    assert model.state == "asleep"
    for _ in range(3):
        model.asking().read("a b", [])
    assert model.state == "ready"
    assert len(made) == 4
    assert len(set(made)) == 1
    assert made[0] != threading.current_thread().name
    model.close()


def test_a_model_that_fails_is_tried_again():
    attempts: list[int] = []

    def factory() -> FakeLive:
        attempts.append(1)
        if len(attempts) < 2:
            raise ModelError("no such model")
        return FakeLive()

    model = LiveModel(factory)
    with pytest.raises(ModelError, match="no such model"):
        model.asking().read("a", [])
    assert model.state == "failed"
    assert model.asking().read("a", [])
    with pytest.raises(ModelError, match="everyscope browse"):
        LiveModel(None).asking().read("a", [])
