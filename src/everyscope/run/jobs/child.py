"""A worker process as its parent sees it: a stream of events that always ends with how the job ended."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from everyscope.run.jobs.job import Spec

Event = dict[str, Any]
ENDS = {"done", "failed", "busy", "stopped", "lost"}
"""Events after which nothing more comes of an attempt."""
GRACE_SECONDS = 30.0
"""How long a job that is asked to stop may take to save its state [s]."""
LAST_LINES = 8
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


class Child:
    """One attempt at a job. `tell` gets every event, from threads of this object; the last is one of ENDS."""

    def __init__(self, spec: Spec, tell: Callable[[Event], None], environment: dict[str, str] | None = None) -> None:
        """Start the process; `environment` is set beside the spec, as CUDA_VISIBLE_DEVICES."""
        self._tell, self._lines, self._end = tell, deque[str](maxlen=LAST_LINES), threading.Lock()
        variables = os.environ | QUIET | spec.environment | (environment or {})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "everyscope.run.jobs.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=spec.folder,
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,  # Ctrl-C at the terminal is for the command, which then stops its jobs in order
            )
        except (FileNotFoundError, NotADirectoryError):
            complaint = f"{spec.folder}: does not exist on {os.uname().nodename}; run from a folder that all hosts share"
            tell({"event": "failed", "kind": "ConfigError", "given": [complaint], "is_final": True})
            self._threads: list[threading.Thread] = []
            return
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._listen, self._read_errors)]
        for thread in self._threads:
            thread.start()
        try:
            self._input.write(spec.model_dump_json() + "\n")
            self._input.flush()
        except BrokenPipeError:
            pass  # it has died already, and _listen tells so

    def stop(self) -> None:
        """Ask the job to save what it has and leave; kill it if it does not. Returns when it is gone."""
        if not self._threads:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for thread in self._threads:
            thread.join()

    @property
    def _input(self) -> Any:
        assert self.process.stdin is not None
        return self.process.stdin

    def _listen(self) -> None:
        assert self.process.stdout is not None
        event, ended = {}, False
        for line in self.process.stdout:
            event = _event(line)
            if event is None:  # a library, or the interpreter as it dies, wrote past our own stream
                self._hear(line)
                continue
            ended = event["event"] in ENDS
            if ended:
                break
            self._tell(event)
        code = self.process.wait()
        self._input.close()
        self._threads[1].join()
        self._tell(event if ended and event else {"event": "lost", "why": _words(code, list(self._lines))})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._hear(line)

    def _hear(self, line: str) -> None:
        if text := line.rstrip():
            self._lines.append(text)
            self._tell({"event": "says", "text": text})


def _event(line: str) -> Event | None:
    """The event that a line spells; None where it spells none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _words(code: int, lines: list[str]) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    return f"its process {how}" + (f" after: {lines[-1]}" if lines else "")
