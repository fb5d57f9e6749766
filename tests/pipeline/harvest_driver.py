"""Harvests that are killed: run as a program, it forks one harvest per moment and ends it there with SIGKILL.

    python harvest_driver.py JSON

JSON has `config` (of a HarvestConfig, without `out`), `base` (a folder) and `kills`: a list of lives, each a list of moments;
a number n stands for one life per n-th moment, for as long as there are moments. A harvest is killed at each of its moments in
turn and then runs to its end, in a folder of its own below `base`; `base`/undisturbed is never killed. Moments count
the changes made to the disk, and a kill comes just before one: a rename, a sync, a batch of rows put, a file deleted.
With `is_preloaded` the model is loaded once, before forking; without, each harvest is the whole command.
Prints, as JSON, for each folder how often its harvest was killed.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.model_handle import model_identity, open_handle
from everyscope.activations.harvest.run import harvest, run
from everyscope.activations.shards.writer import ActivationWriter
from everyscope.base.progress import console


def dies_at(moment: int) -> None:
    """Let this process be killed before the change number `moment` (from 0) that it makes to the disk."""
    moments = iter(range(moment))

    def tick() -> None:
        if next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            tick()
            return function(*args, **kwargs)

        return wrapped

    os.replace, os.fsync, Path.unlink = ticking(os.replace), ticking(os.fsync), ticking(Path.unlink)
    ActivationWriter.put = ticking(ActivationWriter.put)


def preloaded(config: HarvestConfig) -> Callable[[HarvestConfig], object]:
    """`run`, but for a model that is in memory already."""
    handle, identity = open_handle(config), model_identity(config.model)
    capture = handle.open()
    ready = replace(handle, open=lambda: capture)
    return lambda config: harvest(config, identity, lambda config: ready)


def is_killed(run: Callable[[HarvestConfig], object], config: HarvestConfig, moment: int | None) -> bool:
    """Run a harvest in a child; whether it was killed. Any other end than that or success is an error."""
    child = os.fork()
    if child == 0:
        try:
            console.quiet = True
            if moment is not None:
                dies_at(moment)
            run(config)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"moment {moment}: the harvest ended with status {status}"
    return False


def lives(kills: int | list[list[int]]) -> Iterator[list[int]]:
    yield from kills if isinstance(kills, list) else ([moment] for moment in itertools.count(0, kills))


def main(plan: dict) -> dict[str, int]:
    torch.set_num_threads(1)
    base = Path(plan["base"])
    undisturbed = HarvestConfig(**plan["config"], out=base / "undisturbed")
    reap = preloaded(undisturbed) if plan["is_preloaded"] else run
    assert not is_killed(reap, undisturbed, None)
    killed = {}
    for number, moments in enumerate(lives(plan["kills"])):
        config = HarvestConfig(**plan["config"], out=base / f"{number:03d}")
        killed[config.out.name] = sum(is_killed(reap, config, moment) for moment in moments)
        if killed[config.out.name]:
            assert not is_killed(reap, config, None)
        elif isinstance(plan["kills"], int):
            break
    return killed


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
