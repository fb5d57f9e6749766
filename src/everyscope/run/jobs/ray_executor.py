"""A Ray cluster as a place for jobs, through a bridge process that may die with the cluster's head and is then rebuilt.

What was under way when the head went is lost and tried again, without counting as an attempt: jobs on hosts whose head is gone
end by themselves, and resume from their checkpoints.
"""

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from everyscope.base.errors import EveryscopeError
from everyscope.base.progress import say
from everyscope.run.jobs.child import ENDS, GRACE_SECONDS, Event
from everyscope.run.jobs.config import HERE, EngineConfig
from everyscope.run.jobs.job import Job, Resources, spec_of
from everyscope.run.jobs.ray_cluster import LocalCluster, answers, environment_for, require_closed, require_token
from everyscope.run.jobs.schedule import Executor

CONNECT_SECONDS = 120.0
"""How long Ray may take to connect to a head that answers [s]."""
PAUSE_SECONDS = 2.0
SILENCE_SECONDS = 60.0
"""A bridge that says nothing for so long hangs on a head that is gone [s]."""
LOST = {"event": "lost", "why": "the cluster's head went away", "is_blameless": True}
Nodes = list[dict[str, Any]]


class RayExecutor(Executor):
    """The hosts of one cluster."""

    def __init__(self, config: EngineConfig, cpus: int, gpus: int, locks: Path | None) -> None:
        """Connect, or start a cluster with this host's `cpus` and `gpus`. Raises what `ray_cluster` does."""
        require_token()
        self._config, self._here, self._locks = config, (cpus, gpus), locks
        self._cluster: LocalCluster | None = None
        self._bridge: _Bridge | None = None
        self._running: set[str] = set()
        self._lost: list[tuple[str, Event]] = []
        self._is_ending = False
        try:
            self._nodes = self._connect()
        except BaseException:
            self.close()
            raise

    def side_by_side(self, resources: Resources) -> int:
        """Over all hosts that were there when we connected."""
        return sum(_fits(node, resources) for node in self._nodes)

    def submit(self, job: Job) -> None:
        """Hand it to the cluster, which begins it where and when there is room."""
        self._is_ending = False
        spec = spec_of(job, self._locks).model_dump(mode="json")
        self._running.add(job.name)
        self._send({"do": "submit", "job": job.name, "spec": spec, "resources": job.resources.as_json()})

    def cancel(self, name: str) -> None:
        """Ask the cluster to end it."""
        self._is_ending = True
        self._send({"do": "cancel", "job": name})

    def events(self, seconds: float) -> list[tuple[str, Event]]:
        """The events; after a loss of the head, once it has returned, that all jobs under way are lost."""
        found, self._lost = self._lost, []
        if not found and self._bridge is not None:
            for event in self._bridge.events(seconds):
                if event is None:
                    self._connect_again()
                    break
                name = event.pop("job")
                found.append((name, event))
                if event["event"] in ENDS:
                    self._running.discard(name)
        return found

    def close(self) -> None:
        """End what is under way, the bridge, and the cluster if it is ours."""
        if self._bridge is not None:
            self._bridge.close()
        if self._cluster is not None:
            self._cluster.close()
        self._bridge = self._cluster = None

    def _send(self, command: dict[str, Any]) -> None:
        if self._bridge is not None:
            self._bridge.send(command)

    def _connect_again(self) -> None:
        """Rebuild the bridge, unless jobs are being cancelled. EveryscopeError where the cluster stays away."""
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None
        self._lost += [(name, dict(LOST)) for name in sorted(self._running)]
        self._running.clear()
        if not self._is_ending:
            say(f"the Ray cluster at {self._address} went away; connecting again")
            self._nodes = self._connect()

    @property
    def _address(self) -> str:
        return self._config.address if self._cluster is None else self._cluster.address

    def _connect(self) -> Nodes:
        """A bridge to the cluster, and its hosts, as soon as it answers, within the config's time limit."""
        end = time.monotonic() + self._config.patience_seconds
        is_checked = False
        while True:
            if self._config.address == HERE and (self._cluster is None or not self._cluster.is_up):
                if self._cluster is not None:
                    self._cluster.close()
                self._cluster = LocalCluster(*self._here)
            address = self._address
            if answers(address):
                if not is_checked:
                    require_closed(address)
                    is_checked = True
                self._bridge = _Bridge(address)
                nodes = self._bridge.nodes()
                if nodes is not None:
                    return nodes
                self._bridge.close()
                self._bridge = None
            if time.monotonic() > end:
                raise EveryscopeError(
                    f"{address}: no Ray cluster that takes our token answers there; start it (with the same token, and a Ray of "
                    "this version on this host too), and run the same command to resume"
                )
            time.sleep(PAUSE_SECONDS)


class _Bridge:
    """The process that knows Ray, from outside."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "everyscope.run.jobs.ray_bridge", address],
            env=environment_for(address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._last_event = time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    def nodes(self) -> Nodes | None:
        """The cluster's hosts; None where the bridge could not connect."""
        try:
            first = self._events.get(timeout=CONNECT_SECONDS)
        except queue.Empty:
            return None
        self._last_event = time.monotonic()
        return None if first is None else first["nodes"]

    def send(self, command: dict[str, Any]) -> None:
        """Give a command; one that nobody takes any more is seen by the end of the events."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def events(self, seconds: float) -> list[Event | None]:
        """What came within so long; None, as the last, where the bridge is gone."""
        found: list[Event | None] = []
        try:
            found.append(self._events.get(timeout=seconds))
            while found[-1] is not None:
                found.append(self._events.get_nowait())
        except queue.Empty:
            pass
        if found:
            self._last_event = time.monotonic()
        elif time.monotonic() - self._last_event > SILENCE_SECONDS:
            self._process.kill()  # then its events end
        return [event for event in found if event is None or event["event"] != "alive"]

    def close(self) -> None:
        """Let it cancel what is under way, and leave."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(2 * GRACE_SECONDS)
        except BrokenPipeError:
            pass
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray writes there too, in some moods
                self._events.put(json.loads(line))
        self._events.put(None)


def _fits(node: dict[str, Any], resources: Resources) -> int:
    """How many such jobs a host runs at the same time."""
    wanted = {"CPU": resources.cpus, "memory": resources.memory_bytes}
    counts = [int(node.get(name, 0) / want) for name, want in wanted.items() if want]
    gpus = node.get("GPU", 0)
    if resources.gpus >= 1:
        counts.append(int(gpus / resources.gpus))
    elif resources.gpus:
        counts.append(int(gpus) * int(1 / resources.gpus + 1e-9))
    return min(counts)
