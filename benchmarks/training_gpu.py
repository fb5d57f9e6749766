"""One training step on a GPU: everyscope in bfloat16 by pairs and densely, in float32, and other trainers, in one run.

    python benchmarks/training_gpu.py [--json] [--rounds 5] [--calls 5] [--only 2304x16384] [--no-peers]

Rounds alternate between all ways, so that a device whose clock drifts slows all; ratios are taken round by round. Rows are
Gaussian of norm about one; thresholds make latents fire at rates that differ as those of trained SAEs do (log-normal) and add up
to the L0 asked for; the learning rate is so small that this stays so. Before anything is timed, one step of each way is compared
with the dense formulas in float32. Last come three SAEs of 128 x 1,024 as a training group, whose steps are replayed as CUDA
graphs, in steps a second.

`compiled` is plain PyTorch made fast: closed-form gradients instead of autograd, five products under bfloat16 autocast, Adam
without a first moment, everything in one compiled function. Other trainers (benchmarks/gpu_peers.py) take part where they are
installed, at their best precision. With --interpret all runs on the CPU, tiny and uncompiled, to show that it runs. One card
takes four minutes.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import torch
from gpu_peers import peers
from gpu_ways import STEPS, Bfloat16, Dense, Pairs, built, bytes_of, copy_of, rows_of, sae_with_l0, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everyscope.sae.bf16_gpu import LAG
from everyscope.sae.config import SaeConfig
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.presets import fast
from everyscope.sae.trainable import TENSORS, TrainableSae, dense_update
from everyscope.train.replay import Replay
from everyscope.train.training_group import TrainingGroup

SIZES = ((2304, 1 << 14), (2304, 1 << 16), (3584, 1 << 17))
"""d_in and width of each measurement."""
Calls = dict[str, Callable[[], object]]
WIDEST_OF_PEERS = 1 << 16
"""Beyond it four trainers' states and activations do not fit one card together."""
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, at a name within the device's."""


def check_agreement(d_in: int, width: int, batch: int, l0: float, device: str, compiled: bool) -> dict[str, float]:
    """The largest relative difference of a step's gradients (the roots of Adam's fresh means) from dense float32, of each way."""
    sae, x = sae_with_l0(d_in, width, l0, device), rows_of(batch, d_in, device, seed=0)
    oracle = copy_of(sae)
    dense_update(oracle, x, 0, STEPS)
    worst = {}
    # In float32 only sums differ, and pairs within rounding of a border. In bfloat16 many pairs near a border change sides.
    # At this width the L0 is far beyond what steps by pairs are taken for, so that their lists need more room than usual.
    room = batch * width // 4
    for name, way, allowed in (
        ("float32", Pairs(copy_of(sae), max_pairs=room), 1e-3),
        ("bf16_pairs", Bfloat16(copy_of(sae), max_pairs=room, crossover=1e9).forced(True), 0.3),
        ("bf16_dense", Bfloat16(copy_of(sae), max_pairs=room, crossover=-1.0), 0.3),
        ("compiled", Dense(copy_of(sae), compiled), 0.3),
    ):
        way(x)
        roots = {key: (way.sae.squared[key].sqrt(), oracle.squared[key].sqrt()) for key in TENSORS}
        worst[name] = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in roots.values())
        if not worst[name] < allowed:
            sys.exit(
                f"{name} differs from the dense step in float32 by {worst[name]:.2g} at d_in={d_in}: no timing is worth reading"
            )
    return worst


def ways_of(d_in: int, width: int, options: argparse.Namespace, x: Tensor) -> tuple[Calls, dict[str, int], dict[str, Any]]:
    """What is timed, by name; the peak memory of each in bytes; and our own two engines, by precision.

    A way for which the device has not enough memory, or whose package fails, is left out.
    """
    on_cuda, batch = x.device.type == "cuda", options.batch
    calls: Calls = {}
    memory: dict[str, int] = {}
    engines: dict[str, Any] = {}

    def sae() -> TrainableSae:
        return sae_with_l0(d_in, width, options.l0, str(x.device))

    def add(name: str, make: Callable[[], Callable[[Tensor], object]]) -> Callable[[Tensor], object] | None:
        try:
            found = built(make, x, on_cuda)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # another package's
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            found = None
        if found is None:
            return None
        way, memory[name] = found
        calls[name] = lambda: way(x)
        return way

    if ours := add("bf16", lambda: Bfloat16(sae())):
        engines["bf16"] = ours
    if exact := add("float32", lambda: Pairs(sae())):
        engines["float32"] = exact
    add("compiled", lambda: Dense(sae(), on_cuda))
    for name, make in peers(d_in, width, batch, options.l0, x) if options.peers and width <= WIDEST_OF_PEERS else ():
        add(name, make)
    return calls, memory, engines


def measure(d_in: int, width: int, options: argparse.Namespace, device: str) -> dict[str, float | None]:
    """Median times of a size, ratios by round to the bfloat16 engine, and what follows from them."""
    on_cuda, batch = device == "cuda", options.batch
    x = rows_of(batch, d_in, device, seed=2)
    calls, memory, engines = ways_of(d_in, width, options, x)
    if "bf16" not in engines:
        return {"d_in": d_in, "width": width}
    ours = engines["bf16"]
    for _ in range(LAG + 1 if on_cuda else 0):  # to the way that a count of pairs asks for
        ours(x)
    work = ours.engine._work_for(batch, d_in, ours.sae)
    weights = ours.engine._rounded[0].weights.enc
    crossover = float(ours.engine.tensors()["crossover"])
    calls["bf16"] = lambda: ours(x)
    calls["bf16_pairs"] = lambda: ours.forced(True)(x)
    calls["bf16_dense"] = lambda: ours.forced(False)(x)
    calls["product"] = lambda: torch.mm(work.centred, weights.T, out=work.pre)
    chosen = bool(ours.engine.tensors()["uses_pairs"])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            if name == "bf16":
                ours.forced(chosen)
            times[name].append(seconds(call, options.calls, on_cuda))
    ours.forced(True)(x)
    median = {name: statistics.median(values) for name, values in times.items()}
    flops = 2 * batch * d_in * width
    peak = next((value for name, value in PEAKS.items() if on_cuda and name in torch.cuda.get_device_name()), None)
    result: dict[str, float | None] = {"d_in": d_in, "width": width, "rows_per_second": batch / median["bf16"]}
    for name, value in median.items():
        result[f"{name}_ms"] = value * 1e3
        result[f"{name}_ratio"] = statistics.median(slow / fast for slow, fast in zip(times[name], times["bf16"], strict=True))
        if name in memory:
            result[f"{name}_gb"] = memory[name] / 1e9
    if "float32" in engines:
        result["float32_counted_gb_per_s"] = bytes_of(engines["float32"], batch, d_in) / median["float32"] / 1e9
    return result | {
        "goes_by_pairs": float(chosen),
        "crossover": crossover,
        "product_tflops": flops / median["product"] / 1e12,
        "product_of_peak": flops / median["product"] / peak if peak else None,
        "l0": float(ours.losses.l0),
        "pairs_per_row": float(ours.losses.pairs),
        "skipped": int(ours.engine.tensors()["skipped"].sum()),
    }


def group_speed(device: str, calls: int, rows: int = 256, width: int = 1024) -> dict[str, float]:
    """Steps a second of three SAEs of 128 x `width` with the preset `fast` as one training group, replayed and with each kernel
    started.
    """
    configs = [SaeConfig(width=width, target_l0=width * share, preset=fast(128)) for share in (0.012, 0.025, 0.05)]
    x = torch.randn(rows, 128, generator=torch.Generator(device).manual_seed(0), device=device)
    result = {}
    for name, is_replayed in (("group_replayed_steps_per_second", True), ("group_steps_per_second", False)):
        group = TrainingGroup(configs, 128, Normalisation(128**0.5), 10**6, device, products="bfloat16")
        if not is_replayed:
            group._replay = Replay(None)
        for _ in range(min(calls, 30)):  # to the way that the counts ask for, and to its recording
            group.step(x)
        result[name] = 1 / seconds(lambda group=group: group.step(x), calls, device == "cuda")
    return result


LINES = {
    "rows_per_second": "rows/s, bfloat16",
    "bf16_ms": "everyscope, bfloat16, ms",
    "bf16_gb": "  peak memory, GB",
    "bf16_pairs_ms": "  by pairs, ms",
    "bf16_dense_ms": "  densely, ms",
    "product_ms": "  its one product alone, ms",
    "product_tflops": "  TFLOP/s",
    "product_of_peak": "  share of peak",
    "crossover": "  measured crossover, share of pairs",
    "goes_by_pairs": "  went by pairs",
    "float32_ms": "everyscope, float32 by pairs, ms",
    "float32_gb": "  peak memory, GB",
    "float32_counted_gb_per_s": "  counted bytes, GB/s",
    "compiled_ms": "dense bfloat16, compiled, ms",
    "compiled_ratio": "  of everyscope's time",
    "compiled_gb": "  peak memory, GB",
    "sae_lens_ms": "SAELens, autocast, ms",
    "sae_lens_ratio": "  of everyscope's time",
    "sae_lens_gb": "  peak memory, GB",
    "dictionary_learning_ms": "dictionary_learning, autocast, ms",
    "dictionary_learning_ratio": "  of everyscope's time",
    "dictionary_learning_gb": "  peak memory, GB",
    "sparsify_ms": "sparsify TopK, autocast, ms",
    "sparsify_ratio": "  of everyscope's time",
    "sparsify_gb": "  peak memory, GB",
    "l0": "L0",
    "pairs_per_row": "pairs per row",
    "skipped": "steps without room",
}


def table_of(results: list[dict[str, float | None]], title: str) -> Table:
    """The results, a column each; a dash where the device's memory did not suffice or its peak is not known."""
    table = Table("", *(f"{row['d_in']}\n{row['width']}" for row in results), title=title)
    for name, label in LINES.items():
        values = [row.get(name) for row in results]
        table.add_row(label, *("-" if value is None else f"{value:.3g}" for value in values))
    return table


def main() -> None:
    """Check, measure all sizes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="rows")
    parser.add_argument("--l0", type=float, default=100.0, help="active latents a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="steps in a round")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without other trainers")
    parser.add_argument("--only", nargs="*", help="sizes as d_in x width: 3584x131072")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter; times mean nothing")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.only] if options.only else SIZES
    if options.interpret:
        device, sizes, options.batch, options.l0, options.rounds, options.calls = "cpu", ((640, 40),), 8, 4.0, 1, 1
        options.peers = False
    elif torch.cuda.is_available():
        device = "cuda"
        torch.set_float32_matmul_precision("high")  # as the other trainers' best; ours has no float32 products to speed up
    else:
        print("training_gpu measures a CUDA device, and torch sees none here; --interpret shows that it runs.")
        return
    checks = {}
    for d_in in dict.fromkeys(d_in for d_in, _ in sizes):
        checks[d_in] = check_agreement(
            d_in, 40 if options.interpret else 8192, options.batch, options.l0, device, device == "cuda"
        )
    results = []
    for d_in, width in sizes:
        results.append(measure(d_in, width, options, device))
        if device == "cuda":
            torch.cuda.empty_cache()
    group = group_speed(device, 2, 8, 40) if options.interpret else group_speed(device, 400)
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    about = {"device": name, "torch": torch.__version__, "batch": options.batch, "rounds": options.rounds, "calls": options.calls}
    if options.json:
        print(
            json.dumps(
                {**about, "command": " ".join(sys.argv), "agreement": checks, "training group": group, "results": results},
                indent=2,
            )
        )
        return
    console = Console()
    console.print(
        table_of(results, f"{name}, torch {torch.__version__}, batch {options.batch}; medians of {options.rounds} rounds")
    )
    for label, value in group.items():
        console.print(f"three SAEs of 128 x 1,024: {label.replace('_', ' ')} {value:,.0f}")
    for d_in, worst in checks.items():
        differences = ", ".join(f"{way} {value:.1e}" for way, value in worst.items())
        console.print(f"d_in {d_in}: one step's gradients differ from the dense step in float32 by: {differences}")


if __name__ == "__main__":
    main()
