"""What a training step by pairs costs in this checkout beside another one: CPU seconds, one thread.

    python benchmarks/training_versions.py OTHER [--shape d_in,width,batch,L0 ...] [--starts 5] [--rounds 3] [--json FILE]

OTHER is a checkout of another version, as `git worktree add OTHER ef89b4a` makes one. Each version steps in a process of its own,
in turns with the other, and ratios are taken round by round, so that other work on the machine touches both alike. A process's
memory lies better or worse by up to a tenth, so each start takes new ones. Both step by their own `fast`, or this one without
what `fast` gained since (--older-fields). Learning rates are 1e-9: all of a step is computed, and L0 stays where the first batch
set it.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from everyscope.sae.config import SaeConfig
from everyscope.sae.pairs_cpu import CpuPairs
from everyscope.sae.thresholds import warm_start
from everyscope.sae.trainable import new_sae

try:
    from everyscope.sae.presets import fast
except ModuleNotFoundError:  # its name before
    from everyscope.sae.recipes import fast  # pyright: ignore[reportMissingImports]

SHAPES = ("128,1024,256,25", "576,4096,512,50")
BATCHES = 4
SECONDS = 0.3
"""About how long each version steps in a round [s]."""
OLDER_FIELDS = "older fields"
OLDER = {"encoder_follows": False, "direction_rate": None, "largest_step": None, "is_centred": False, "largest_row": None}
"""Fields of a preset that came later, as they are without them."""


def serve(shape: str, kind: str) -> None:
    """Step whenever a number of steps is read; answer with CPU seconds a step and pairs a row. Names are of any version."""
    torch.set_num_threads(1)
    d, width, batch, l0 = map(int, shape.split(","))
    preset = fast(d)
    changes = {"learning_rate": 1e-9} | ({"direction_rate": 1e-9} if getattr(preset, "direction_rate", None) else {})
    preset = preset.model_copy(update=changes | (OLDER if kind == OLDER_FIELDS else {}))
    fields = SaeConfig.model_fields
    given: dict[str, Any] = {"preset" if "preset" in fields else "recipe": preset}
    given |= {} if "target_weight" in fields else {"sparsity_coefficient": 4.0}
    sae = new_sae(SaeConfig(width=width, target_l0=l0, **given), d)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, d, generator=generator) / d**0.5 for _ in range(BATCHES)]
    warm_start(sae, batches[0])
    engine, number, pairs = CpuPairs([sae]), 0, 0.0
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            pairs = float(engine.step(batches[number % BATCHES], number, 10**6)[0].pairs)
            number += 1
        print((time.process_time() - began) / int(line), pairs, flush=True)


def measured(shape: str, rounds: int, checkouts: dict[str, tuple[Path, str]]) -> list[dict[str, tuple[float, float]]]:
    """Seconds and pairs of each version's step, round by round, of one start of the processes."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, "--shape", shape],
            env=os.environ | {"PYTHONPATH": str(path / "src"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (path, kind) in checkouts.items()
    }

    def ask(name: str, steps: int) -> tuple[float, float]:
        told, heard = workers[name].stdin, workers[name].stdout
        assert told is not None
        assert heard is not None
        print(steps, file=told, flush=True)
        seconds, pairs = map(float, heard.readline().split())
        return seconds, pairs

    for name in workers:  # compiles
        ask(name, 2)
    steps = max(2, round(SECONDS / min(ask(name, 2)[0] for name in workers)))
    found = [{name: ask(name, steps) for name in [*workers][:: 1 if number % 2 else -1]} for number in range(rounds)]
    for worker in workers.values():
        worker.communicate()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--older-fields", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.shape[0], given.serve)
        return
    if given.other is None:
        parser.error("OTHER, a checkout of another version, is missing")
    here = Path(__file__).resolve().parents[1]
    checkouts = {"other": (given.other, "fast"), "this": (here, OLDER_FIELDS if given.older_fields else "fast")}
    found = {}
    for shape in given.shape:
        found[shape] = rounds = [one for _ in range(given.starts) for one in measured(shape, given.rounds, checkouts)]
        ratios = sorted(one["this"][0] / one["other"][0] for one in rounds)
        ms = {name: 1e3 * statistics.median(one[name][0] for one in rounds) for name in checkouts}
        pairs = ", ".join(f"{rounds[-1][name][1]:.1f}" for name in checkouts)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{shape}: {ms['other']:.2f} ms, here {ms['this']:.2f} ms, ratio {spread}; pairs a row: {pairs}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"command": shlex.join(sys.argv), "found": found}, indent=1))


if __name__ == "__main__":
    main()
