"""Interpreters that start in milliseconds: forked from one that has imported torch and everyscope already.

Importing both costs a fresh interpreter some four CPU-seconds, and the tests start hundreds. The fixture `forked_interpreters`
replaces `subprocess.Popen` (for commands that run this interpreter; other programs start as usual) and the `spawn` method of
multiprocessing: in the tests of a module, in the code under test, and in the processes that these start. What starts is a process
of its own: signals, exit codes, output, sessions, files and memory behave as in a fresh one. Different is only what precedes the
first line of a program: modules that are loaded, and environment variables that libraries read when loaded.
"""

import atexit
import json
import multiprocessing.context
import multiprocessing.popen_spawn_posix
import multiprocessing.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS = "EVERYSCOPE_TESTS_FORK_SERVER"
"""Variable that holds the path of the server's socket, for processes that start others."""
MAX_FDS = 32
RealPopen = subprocess.Popen


def request(command: Sequence[str], fds: dict[int, int], **how: Any) -> tuple[socket.socket, int]:
    """Start `command`, whose file descriptor `n` is our `fds[n]`; the connection that tells how it ended, and its pid."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[ADDRESS])
    message = json.dumps({"command": list(map(os.fsdecode, command)), "fds": list(fds), **how}).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], list(fds.values()))
    connection.sendall(message)
    return connection, _number(connection)


def status(connection: socket.socket, is_patient: bool) -> int | None:
    """The wait status of a process that has ended; None of one that runs, if not `is_patient`."""
    connection.setblocking(is_patient)
    try:
        found = _number(connection)
    except BlockingIOError:
        return None
    connection.close()
    return found


def _number(connection: socket.socket) -> int:
    line = connection.recv(8, socket.MSG_WAITALL)
    assert len(line) == 8, "the fork server has died"
    return int.from_bytes(line, "big")


class ForkedPopen(RealPopen):
    """subprocess.Popen, by the fork server where the command is this interpreter's."""

    _connection: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        """As in the standard library, whose positional arguments these are."""
        _, _, cwd, env, _, _, shell, *pipes, _, _, _, _, _, start_new_session, _ = rest
        if shell or preexec_fn or executable or isinstance(args, str | bytes | os.PathLike) or args[0] != sys.executable:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes
        if cwd is not None and not Path(cwd).is_dir():
            raise FileNotFoundError(f"no such folder: {cwd}")
        fds = {number: pipe if pipe != -1 else number for number, pipe in enumerate((p2cread, c2pwrite, errwrite))}
        how = {"cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env), "is_leader": start_new_session}
        self._connection, self.pid = request(args[1:], fds, **how)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        found = status(self._connection, is_patient=not wait_flags & os.WNOHANG)
        return (0, 0) if found is None else (self.pid, found)

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, found = (0, 0) if self.returncode is not None else self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(found)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


class ForkedSpawn(multiprocessing.popen_spawn_posix.Popen):
    """A process of multiprocessing's spawn method, by the fork server."""

    _connection: socket.socket

    def _launch(self, process_obj: Any) -> None:
        def start(path: Any, command: Sequence[Any], fds: Sequence[int]) -> int:
            if "resource_tracker" in str(command[-1]):  # which is light, and to outlive nobody but its parent
                return real(path, command, fds)
            how = {"cwd": str(Path.cwd()), "env": dict(os.environ), "is_leader": False}
            arguments = [os.fsdecode(part) for part in command[1:]]
            wanted = {number: number for number in (0, 1, 2, *fds)}
            self._connection, pid = request(arguments, wanted, **how)
            return pid

        real, multiprocessing.util.spawnv_passfds = multiprocessing.util.spawnv_passfds, start
        try:
            super()._launch(process_obj)  # type: ignore[misc]
        finally:
            multiprocessing.util.spawnv_passfds = real

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """As in the standard library."""
        if self.returncode is None and (found := status(self._connection, is_patient=flag == 0)) is not None:
            self.returncode = os.waitstatus_to_exitcode(found)
        return self.returncode


def install() -> None:
    """From now on this process starts interpreters by the server at ADDRESS."""
    subprocess.Popen = ForkedPopen
    multiprocessing.context.SpawnProcess._Popen = staticmethod(ForkedSpawn)  # type: ignore[assignment]


@contextmanager
def forked_interpreters() -> Iterator[None]:
    """Interpreters that are started in the block are forked; where there is no Linux they start as ever."""
    if sys.platform != "linux":
        yield
        return
    before = multiprocessing.context.SpawnProcess._Popen
    os.environ[ADDRESS] = _server()
    install()
    try:
        yield
    finally:
        subprocess.Popen = RealPopen
        multiprocessing.context.SpawnProcess._Popen = staticmethod(before)  # type: ignore[assignment]
        del os.environ[ADDRESS]


_started: list[str] = []


def _server() -> str:
    """The path of this process's server, which is started when first asked for and ends with this process."""
    if not _started:
        folder = tempfile.mkdtemp(prefix="everyscope-")
        path = f"{folder}/socket"
        server = RealPopen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n", "the fork server did not start; its complaint is above"

        def end() -> None:
            server.communicate()
            Path(path).unlink(missing_ok=True)
            Path(folder).rmdir()

        atexit.register(end)
        _started.append(path)
    return _started[0]
