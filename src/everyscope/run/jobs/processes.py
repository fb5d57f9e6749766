"""This host as a place for jobs: a process for each, packed on GPUs by their shares and on cores by their number."""

import queue
import threading
from pathlib import Path

from everyscope.run.jobs.child import ENDS, Child, Event
from everyscope.run.jobs.job import Job, Resources, spec_of
from everyscope.run.jobs.schedule import Executor

VISIBLE = "CUDA_VISIBLE_DEVICES"
ROUNDING = 1e-9
"""Shares of a device are added up in floating point [1]."""


class Processes(Executor):
    """Worker processes on this host. A job that does not fit beside the others waits, and smaller ones may pass it."""

    def __init__(self, cpus: int, devices: list[str], locks: Path | None) -> None:
        """`devices` are this host's GPUs, as CUDA_VISIBLE_DEVICES names them; `locks` is the folder of the jobs' locks."""
        self._free_cpus, self._free, self._locks = cpus, dict.fromkeys(devices, 1.0), locks
        self._cpus = cpus
        self._queue: list[Job] = []
        self._running: dict[str, tuple[Child, Job, list[str]]] = {}
        self._events: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()

    def side_by_side(self, resources: Resources) -> int:
        """By cores and GPUs, whichever is scarcer."""
        by_cpus = self._cpus // resources.cpus
        if not resources.gpus:
            return by_cpus
        num_devices = len(self._free)
        by_gpus = num_devices // _whole(resources) if resources.gpus >= 1 else num_devices * int(1 / resources.gpus + ROUNDING)
        return min(by_cpus, by_gpus)

    def submit(self, job: Job) -> None:
        """Begin it, or let it wait for room."""
        self._queue.append(job)
        self._fill()

    def cancel(self, name: str) -> None:
        """End it; one that has not begun is gone at once."""
        if name in self._running:
            threading.Thread(target=self._running[name][0].stop, daemon=True).start()
        waiting = [job for job in self._queue if job.name == name]
        for job in waiting:
            self._queue.remove(job)
            self._events.put((name, {"event": "stopped"}))

    def events(self, seconds: float) -> list[tuple[str, Event]]:
        """The processes' reports; room that one of them leaves is taken at once."""
        found: list[tuple[str, Event]] = []
        try:
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for name, event in found:
            if event["event"] in ENDS and name in self._running:
                _, job, devices = self._running.pop(name)
                self._free_cpus += job.resources.cpus
                for device in devices:
                    self._free[device] += min(job.resources.gpus, 1.0)
        self._fill()
        return found

    def close(self) -> None:
        """End every process."""
        self._queue.clear()
        for child, _, _ in list(self._running.values()):
            child.stop()

    def _fill(self) -> None:
        for job in list(self._queue):
            devices = self._devices_for(job.resources)
            if devices is not None and job.resources.cpus <= self._free_cpus:
                self._queue.remove(job)
                self._start(job, devices)

    def _start(self, job: Job, devices: list[str]) -> None:
        self._free_cpus -= job.resources.cpus
        for device in devices:
            self._free[device] -= min(job.resources.gpus, 1.0)
        seen = {VISIBLE: ",".join(devices)} if self._free else {}

        def tell(event: Event) -> None:
            self._events.put((job.name, event))

        self._running[job.name] = (Child(spec_of(job, self._locks), tell, seen), job, devices)

    def _devices_for(self, resources: Resources) -> list[str] | None:
        """The devices with most room for it, fewest jobs first; None where there is no room now."""
        if not resources.gpus:
            return []
        share, count = min(resources.gpus, 1.0), _whole(resources)
        roomy = sorted((device for device in self._free if self._free[device] >= share - ROUNDING), key=lambda d: -self._free[d])
        return roomy[:count] if len(roomy) >= count else None


def _whole(resources: Resources) -> int:
    """How many devices a job sees [devices]."""
    return max(1, round(resources.gpus))
