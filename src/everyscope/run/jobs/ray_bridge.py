"""The only process of a run that knows Ray: `python -m everyscope.run.jobs.ray_bridge ADDRESS`.

Commands come on standard input, events leave on standard output, a JSON object on each line:

    in    {"do": "submit", "job": NAME, "spec": {...}, "resources": {...}}      {"do": "cancel", "job": NAME}
    out   {"event": "cluster", "nodes": [...]}      once, when the cluster has answered; then {"job": NAME, "event": ...}
          {"event": "alive"}                        now and then, as long as the cluster knows this process's host

A process of its own, because Ray ends the process that uses it when the cluster's head is away for a minute. Then standard output
ends, and the parent may begin again. When standard input ends, every job is cancelled: it saves its state and leaves.

What goes to the cluster's hosts is the name of a function, in `everyscope.run.jobs.ray_task`, and a Spec as text; what comes
back are lines of JSON.
"""

import json
import os
import queue
import sys
import threading
import time
from typing import Any

from everyscope.base.extras import import_extra
from everyscope.run.jobs.child import ENDS, GRACE_SECONDS, Event
from everyscope.run.jobs.job import Resources
from everyscope.run.jobs.ray_cluster import LOOPBACK, stays_here
from everyscope.run.jobs.ray_task import task

WAIT_SECONDS = 0.2
BEAT_SECONDS = 3.0
MIN_GPU_SHARE = 0.01
"""Ray counts shares of a GPU no finer than it needs to [1]."""


class Bridge:
    """The attempts that are under way on a cluster."""

    def __init__(self, ray: Any, tell: Any) -> None:
        """`ray` is the module, connected."""
        self._ray, self._tell = ray, tell
        self._running: dict[str, Any] = {}

    def do(self, command: dict[str, Any]) -> None:
        """Obey one command."""
        name = command["job"]
        if command["do"] == "submit":
            self._running[name] = self._submit(command["spec"], Resources.model_validate(command["resources"]), name)
        elif name in self._running:
            self._ray.cancel(self._running[name], force=False)

    def cancel_all(self) -> None:
        """Ask all to save what they have and to leave, and wait for it a while."""
        for attempt in self._running.values():
            self._ray.cancel(attempt, force=False)
        end = time.monotonic() + GRACE_SECONDS
        while self._running and time.monotonic() < end:
            self.listen()

    def listen(self) -> None:
        """Pass on the tasks' reports, waiting for a moment."""
        if not self._running:
            time.sleep(WAIT_SECONDS)
            return
        names = {id(attempt): name for name, attempt in self._running.items()}
        ready, _ = self._ray.wait(list(self._running.values()), num_returns=len(names), timeout=WAIT_SECONDS)
        for attempt in ready:
            name = names[id(attempt)]
            try:
                event = json.loads(self._ray.get(next(attempt)))
            except StopIteration:  # the last event has been passed on
                self._running.pop(name, None)
                continue
            except self._ray.exceptions.TaskCancelledError:
                event = {"event": "stopped"}
            except self._ray.exceptions.RayError as error:
                is_host = isinstance(error, self._ray.exceptions.NodeDiedError)  # no fault of the job's
                event = {"event": "lost", "why": f"its worker was lost ({type(error).__name__})", "is_blameless": is_host}
            self._tell(event | {"job": name})
            if event["event"] in ENDS:
                self._running.pop(name, None)

    def _submit(self, spec: dict[str, Any], wanted: Resources, name: str) -> Any:
        options: dict[str, Any] = {"num_cpus": wanted.cpus, "max_retries": 0, "num_returns": "streaming", "name": name}
        if wanted.gpus:
            options["num_gpus"] = max(wanted.gpus, MIN_GPU_SHARE)
        if wanted.memory_bytes:
            options["memory"] = wanted.memory_bytes
        return self._ray.remote(task).options(**options).remote(json.dumps(spec))


def main() -> None:
    """Serve the parent process, until standard input ends."""
    address = sys.argv[1]
    ray = import_extra("ray", "ray", "Running jobs on a Ray cluster")
    own = {"_node_ip_address": LOOPBACK} if stays_here(address) else {}
    ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            print(json.dumps(event), flush=True)

    nodes = [node for node in ray.nodes() if node["Alive"]]
    tell({"event": "cluster", "nodes": [{"address": node["NodeManagerAddress"], **node["Resources"]} for node in nodes]})
    threading.Thread(target=_beat, args=(ray, tell), daemon=True).start()
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    bridge = Bridge(ray, tell)
    while True:
        while not commands.empty():
            command = commands.get()
            if command is None:
                bridge.cancel_all()
                ray.shutdown()
                return
            bridge.do(command)
        bridge.listen()


def _beat(ray: Any, tell: Any) -> None:
    """Report that all is well until the cluster no longer knows our host, as after a restart of the cluster."""
    own = ray.get_runtime_context().get_node_id()
    while any(node["NodeID"] == own and node["Alive"] for node in ray.nodes()):
        tell({"event": "alive"})
        time.sleep(BEAT_SECONDS)
    os._exit(1)  # Ray may wait for the old head for ever


def _read(commands: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    buffered = b""
    with open(0, "rb", buffering=0, closefd=False) as stream:
        while piece := stream.read(1 << 16):
            buffered += piece
            *lines, buffered = buffered.split(b"\n")
            for line in lines:
                commands.put(json.loads(line))
    commands.put(None)


if __name__ == "__main__":
    main()
