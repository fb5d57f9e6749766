"""What a step of a transcoder costs beside an SAE's of the same sizes, without and with a skip: CPU seconds, one thread.

    python benchmarks/transcoder_step.py [--shape d_in,width,batch,L0 ...] [--rounds 7] [--float32] [--json FILE]

The coders of a shape take turns, round by round, and each ratio is the median over rounds, so that other work on the machine
touches all alike. Learning rates are 1e-9: all of a step is computed, and L0 stays where the first batch set it. Pairs are
counted, since a step's time depends on them. The last column is the share of a skip step's multiplications that are the skip's:
4 batch d_in d_out, of them and of the encoder's 2 batch d_in width and some 8 a pair and coordinate.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everyscope.sae.config import SaeConfig
from everyscope.sae.pairs_cpu import CpuPairs
from everyscope.sae.presets import fast, fast_transcoder
from everyscope.sae.thresholds import warm_start
from everyscope.sae.trainable import new_sae

SHAPES = ("128,1024,256,25", "384,8192,2048,50", "576,4096,512,50", "576,16384,512,50", "2304,8192,512,100")
KINDS = ("SAE", "transcoder", "with skip")
BATCHES = 4
SECONDS = 0.3
"""About how long each coder steps in a round [s]."""


def rows(batch: int, d: int, seed: int) -> Tensor:
    """Normalised rows."""
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(seed))
    return x / x.square().sum(1).mean().sqrt()


def measured(shape: str, rounds: int, rounds_skips: bool) -> dict[str, Any]:
    """Milliseconds, ratios and pairs of all kinds at one shape."""
    d, width, batch, l0 = map(int, shape.split(","))
    batches = [(rows(batch, d, 2 * i), rows(batch, d, 2 * i + 1)) for i in range(BATCHES)]
    steps, pairs = {}, {}
    for kind in KINDS:
        preset = fast(d) if kind == "SAE" else fast_transcoder(d)
        still = {"learning_rate": 1e-9, "direction_rate": 1e-9, "encoder_follows": preset.encoder_follows}
        config = SaeConfig(width=width, target_l0=l0, preset=preset.model_copy(update=still), skip=kind == "with skip")
        sae = new_sae(config, d, d_out=None if kind == "SAE" else d)
        sides = [batches[0][0], None if kind == "SAE" else batches[0][1]]
        warm_start(sae, sides[0], target=sides[1])
        engine = CpuPairs([sae], rounds_skips=rounds_skips)

        def step(number: int, engine: CpuPairs = engine, is_sae: bool = kind == "SAE") -> float:
            x, y = batches[number % BATCHES]
            return float(engine.step(x, number, 10**6, None if is_sae else y)[0].pairs)

        step(0)
        steps[kind], pairs[kind] = step, statistics.mean(step(number) for number in range(BATCHES))
    begin = time.process_time()
    steps["SAE"](0)
    calls = max(2, round(SECONDS / max(time.process_time() - begin, 1e-5)))
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            begin = time.process_time()
            for number in range(calls):
                steps[kind](number)
            took[kind].append((time.process_time() - begin) / calls)
    ratios = {kind: statistics.median(a / b for a, b in zip(took[kind], took["SAE"], strict=True)) for kind in KINDS}
    products = 4 * d * d, 2 * d * width + 8 * d * pairs["with skip"]
    return {
        "shape": [d, width, batch, l0],
        "ms": {kind: 1e3 * statistics.median(values) for kind, values in took.items()},
        "ratio": ratios,
        "pairs": pairs,
        "skip_share": products[0] / sum(products),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--float32", action="store_true", help="gradients of skips without rounding")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measured(shape, options.rounds, not options.float32) for shape in options.shape]
    if options.json:
        options.json.write_text(json.dumps({"command": shlex.join(sys.argv), "results": results}, indent=1) + "\n")
    table = Table("d_in = d_out", "width", "batch", "L0", "pairs", "SAE [ms]", *KINDS[1:], "skip's share")
    for result in results:
        pairs = " ".join(f"{number:.0f}" for number in result["pairs"].values())
        ratios = [f"{result['ratio'][kind]:.2f}" for kind in KINDS[1:]]
        table.add_row(*map(str, result["shape"]), pairs, f"{result['ms']['SAE']:.2f}", *ratios, f"{result['skip_share']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
