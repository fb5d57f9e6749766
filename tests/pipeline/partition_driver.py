"""Harvests by several processes at once: run as a program, it forks one process a partition, and ends some with SIGKILL.

    python partition_driver.py JSON

JSON has `config` (of a HarvestConfig, without `out`), `base` (a folder), `partitions`: the partition of each process, `kills`:
for each process, the moments (as harvest_driver counts them) at which its successive lives end, and `num_tokens`: a list of
targets, harvested one after another into `base`/several, and by one process into `base`/one. Prints, as JSON, the number of
lives that were killed, and what the other lives that did not succeed complained of.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harvest_driver import dies_at, preloaded

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.base.errors import EveryscopeError
from everyscope.base.progress import console


def begin(run: Callable[[HarvestConfig], object], config: HarvestConfig, moment: int | None) -> tuple[int, int]:
    """A child that harvests, to be killed at `moment`, unless that is None; its id, and a pipe from it for an error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        console.quiet = True
        os.close(reading)
        if moment is not None:
            dies_at(moment)
        try:
            run(config)
        except EveryscopeError as error:
            os.write(writing, str(error).encode())
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    return child, reading


def end(child: int, reading: int) -> str | None:
    """Wait for a child: None where it was killed, its error, or nothing."""
    with os.fdopen(reading) as pipe:
        complaint = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, f"a harvest ended with status {status}"
    return complaint


def main(plan: dict) -> dict:
    torch.set_num_threads(1)
    base, kills = Path(plan["base"]), [list(moments) for moments in plan["kills"]]
    run = preloaded(HarvestConfig(**plan["config"], num_tokens=1, out=base))
    killed, complaints = 0, []
    for num_tokens in plan["num_tokens"]:
        fields = plan["config"] | {"num_tokens": num_tokens}
        assert end(*begin(run, HarvestConfig(**fields, out=base / "one"), None)) == ""
        waiting = set(range(len(plan["partitions"])))
        while waiting:
            children = {}
            for index in sorted(waiting):
                config = HarvestConfig(**fields, out=base / "several", partition=plan["partitions"][index])
                children[index] = begin(run, config, kills[index].pop(0) if kills[index] else None)
            for index, child in children.items():
                complaint = end(*child)
                killed += complaint is None
                if complaint is not None:
                    waiting.discard(index)
                if complaint:
                    complaints.append(complaint)
    return {"killed": killed, "complaints": complaints}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
