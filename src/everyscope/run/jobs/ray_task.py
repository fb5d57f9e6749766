"""What runs on a cluster's host: a task of Ray's that starts `everyscope.run.jobs.worker` and hands its events on.

It lies in a module of its own, which is never a program's main one: so Ray finds it by its name and sends no code.
"""

import json
import queue
from collections.abc import Iterator

from everyscope.base.extras import import_extra
from everyscope.run.jobs.child import ENDS, Child, Event
from everyscope.run.jobs.job import Spec

POLL_SECONDS = 0.2
"""Short, because Ray cancels a task by an exception between two of its instructions [s]."""
ADDRESS_VARIABLE = "EVERYSCOPE_NODE_ADDRESS"
"""Tells a job under which address other hosts of the cluster find its own."""


def task(spec: str) -> Iterator[str]:
    """Run a spec's job in a process of its own and yield its events, JSON lines, the last of them one of ENDS."""
    ray = import_extra("ray", "ray", "Running jobs on a Ray cluster")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    child = Child(Spec.model_validate_json(spec), events.put, {ADDRESS_VARIABLE: ray.util.get_node_ip_address()})
    try:
        while True:
            try:
                event = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            yield json.dumps(event)
            if event["event"] in ENDS:
                return
    finally:
        child.stop()
