"""Imports torch and everyscope once, and forks: what tests/forked.py asks. Ends when its standard input does.

No threads of ours or of torch: only then is a fork as good as a fresh process, and it is checked.
"""

import atexit
import contextlib
import fcntl
import importlib
import io
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

import forked
import torch

HIGH = 200
"""Received descriptors are moved up there before they get the numbers that they are to have."""


def preload() -> None:
    """Import what processes under test import, and see that this leaves no thread and no open file behind."""
    everyscope = importlib.import_module("everyscope")
    for module in pkgutil.walk_packages(everyscope.__path__, "everyscope."):
        if module.name.rpartition(".")[2] in ("run", "main", "pipeline", "worker"):
            importlib.import_module(module.name)
    for name in ("transformers.models.gemma2.modeling_gemma2", "tokenizers", "pyarrow.flight", "multiprocessing.spawn"):
        importlib.import_module(name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads.remove(Path("/proc/self/comm").read_text().strip())
    # Arrow's jemalloc holds its locks over a fork, and starts its thread again in the child.
    assert not set(threads) - {"jemalloc_bg_thd"}, (
        f"a library has started threads, of which forks would miss what they do: {threads}"
    )


class Server:
    """Forks for whoever connects, and tells each how its process ended."""

    def __init__(self, path: str) -> None:
        """Listen at `path`."""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.waiting: dict[int, socket.socket] = {}
        self.bell = socket.socketpair()
        for end in self.bell:
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self.bell[1].fileno())

    def run(self) -> None:
        """Until standard input ends."""
        with selectors.DefaultSelector() as selector:
            for source in (self.listener, self.bell[0], sys.stdin):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self.bell[0] in ready:
                    self.bell[0].recv(4096)
                    self.reap()
                if self.listener in ready:
                    self.start(selector)
                if sys.stdin in ready and not os.read(0, 1):
                    return

    def reap(self) -> None:
        """Tell how processes ended."""
        while self.waiting:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.tell(self.waiting.pop(pid), status, is_last=True)

    def tell(self, connection: socket.socket, number: int, is_last: bool = False) -> None:
        """Send a number to who may have gone away."""
        with contextlib.suppress(OSError):
            connection.sendall(number.to_bytes(8, "big"))
        if is_last:
            connection.close()

    def start(self, selector: selectors.BaseSelector) -> None:
        """Fork for one that has connected."""
        connection, _ = self.listener.accept()
        size, fds, _, _ = socket.recv_fds(connection, 8, forked.MAX_FDS)
        message = b""
        while len(message) < int.from_bytes(size, "big"):
            message += connection.recv(1 << 20)
        asked = json.loads(message)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                selector.close()
                for other in (connection, self.listener, *self.bell, *self.waiting.values()):
                    other.close()
                code = become(asked, fds)
            finally:
                os._exit(code)
        for fd in fds:
            os.close(fd)
        self.waiting[pid] = connection
        self.tell(connection, pid)


def become(asked: dict[str, Any], fds: list[int]) -> int:
    """Be the process that is asked for; its exit code."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(high, asked["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    if asked["is_leader"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))  # as when torch is loaded
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), encoding="utf-8")
    sys.stdout, sys.stderr = output(1, "strict"), output(2, "backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    forked.install()
    code = outcome(asked["command"])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120  # as of an interpreter that cannot write its last words
    return code


def output(fd: int, errors: str) -> io.TextIOWrapper:
    """A standard stream for writing, as an interpreter makes it."""
    raw = io.FileIO(fd, "w", closefd=False)
    is_direct = bool(os.environ.get("PYTHONUNBUFFERED"))
    binary: Any = raw if is_direct else io.BufferedWriter(raw)
    return io.TextIOWrapper(binary, encoding="utf-8", errors=errors, line_buffering=fd == 2, write_through=is_direct)


def outcome(command: list[str]) -> int:
    """Run `-c CODE ...`, `-m MODULE ...` or `FILE ...` as the main module; its exit code."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[0:1] = [*paths]
    while command[0].startswith("-") and command[0] not in ("-c", "-m"):  # an interpreter's own options, as -B
        command = command[2 if command[0] in ("-X", "-W") else 1 :]
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            sys.path.insert(0, "")
            module = types.ModuleType("__main__")
            sys.modules["__main__"] = module
            exec(compile(command[1], "<string>", "exec"), vars(module))
        elif command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(Path.cwd()))
            sys.modules.pop(command[1], None)  # as in a fresh interpreter, which runs it but has not imported it
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return (left.code or 0) & 0xFF
        print(left.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    preload()
    server = Server(sys.argv[1])
    print("ready", flush=True)
    server.run()
