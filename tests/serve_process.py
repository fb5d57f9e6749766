"""Activation servers and clients in processes of their own, to be killed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from everyscope.activations.serve.config import ServeConfig

TOKEN = "a-token-for-tests-only-0123456789"
SERVER = """
import sys
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.run import run
run(ServeConfig.model_validate_json(sys.argv[1]))
"""
PATIENCE = 60.0
"""Longest wait for a process to start or end [s]; a shared machine may be slow."""


def wait_until(is_true, what: str, patience: float = PATIENCE) -> None:
    """Poll until `is_true()`; AssertionError after `patience` [s]."""
    end = time.monotonic() + patience
    while not is_true():
        assert time.monotonic() < end, f"in vain for {patience} s: {what}"
        time.sleep(0.005)


def spawn(code: str, *arguments: str, token: str | None = None) -> subprocess.Popen[bytes]:
    """Run `code` in a new interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "EVERYSCOPE_TOKEN"} | {"OMP_NUM_THREADS": "1"}
    if token is not None:
        environment["EVERYSCOPE_TOKEN"] = token
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


@dataclass
class ServerProcess:
    """A server, its config and where it listens."""

    process: subprocess.Popen[bytes]
    config: ServeConfig
    port: int

    def events(self, what: str) -> list[dict]:
        """Its log's lines of one kind."""
        assert self.config.log is not None
        lines = [json.loads(line) for line in self.config.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == what]

    def again(self, token: str | None = None) -> "ServerProcess":
        """The same server, started anew on the same port."""
        return start_server(self.config.model_copy(update={"listen": f"127.0.0.1:{self.port}"}), token)


def start_server(config: ServeConfig, token: str | None = None) -> ServerProcess:
    """Start a server, which must have a `log`, and wait until it listens."""
    assert config.log is not None
    process = spawn(SERVER, config.model_dump_json(), token=token)
    before = _listening(config.log)

    def is_listening() -> bool:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        return len(_listening(config.log)) > len(before)

    # A line that was written between spawn and `before` would be missed: the interpreter takes far longer to start.
    wait_until(is_listening, "server to listen")
    return ServerProcess(process, config, int(_listening(config.log)[-1]["address"].rpartition(":")[2]))


def _listening(log: Path) -> list[dict]:
    if not log.exists():
        return []
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if line["event"] == "listen"]


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own [bytes]."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
