"""One training step on a GPU: by pairs, beside the same step done densely in bfloat16 and compiled, in one run.

    python benchmarks/training_gpu.py [--json] [--rounds 9] [--calls 10] [--only 3584x131072]

Rounds alternate between both ways and the bare encoder product, so that a device whose clock drifts slows all; ratios are taken
round by round. Rows are Gaussian of norm about one; thresholds make latents fire at rates that differ as those of trained SAEs
do (log-normal) and add up to the L0 asked for; the learning rate is so small that this stays so. Before anything is timed, one
step of each way is compared with the dense formulas in float32.

The baseline is made fast: closed-form gradients instead of autograd, five products under bfloat16 autocast, Adam without a first
moment, everything in one compiled function. With --interpret all runs on the CPU, tiny and uncompiled, to show that it runs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everyscope.sae.config import SaeConfig, SaeRecipe
from everyscope.sae.functional import unit_rows, without_parallel_part
from everyscope.sae.pairs_gpu import GpuPairs
from everyscope.sae.trainable import TENSORS, TrainableSae, dense_update, new_sae

SIZES = ((3584, 1 << 17), *((2304, 1 << power) for power in (14, 15, 16, 17, 18, 19, 20)))
"""d_in and width of each measurement."""
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, at a name within the device's."""
COEFFICIENT, SPREAD, MOST = 2e-3, 1.5, 0.3
"""Of sparsity; of the rates' logarithm; the highest rate."""
RECIPE = SaeRecipe(learning_rate=1e-6, learning_rate_warmup_steps=0, sparsity_warmup_steps=0)
STEPS = 10**6
Way = TypeVar("Way", bound=Callable[[Tensor], None])


def sae_with_l0(d_in: int, width: int, l0: float, device: str) -> TrainableSae:
    """An SAE whose latents fire on Gaussian rows of norm one, at rates that add up to `l0`."""
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=COEFFICIENT, recipe=RECIPE), d_in, device)
    rates = (torch.randn(width, generator=torch.Generator().manual_seed(1)).double() * SPREAD).exp()
    rates = (rates * l0 / rates.sum()).clamp(1e-12, MOST)
    sae.parameters["threshold"].copy_(-torch.special.ndtri(rates) / d_in**0.5)
    return sae


def rows_of(batch: int, d_in: int, device: str, seed: int) -> Tensor:
    """Gaussian rows with E||x||^2 = 1."""
    return torch.randn(batch, d_in, generator=torch.Generator(device).manual_seed(seed), device=device) / d_in**0.5


def copy_of(sae: TrainableSae) -> TrainableSae:
    """The same SAE in memory of its own."""
    copies = [
        {name: t.T.clone().T if name == "w_enc" else t.clone() for name, t in d.items()} for d in (sae.parameters, sae.squared)
    ]
    return replace(sae, parameters=copies[0], squared=copies[1], touched=sae.touched.clone(), last_fired=sae.last_fired.clone())


def dense_step(p: dict[str, Tensor], v: dict[str, Tensor], x: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline, in place; the reconstruction's mean squared error and L0."""
    half = RECIPE.bandwidth / 2
    with torch.autocast(x.device.type, torch.bfloat16):
        centred = x - p["b_dec"]
        pre = centred @ p["w_enc"] + p["b_enc"]
        active = (pre > p["threshold"]).to(pre.dtype)
        near = ((pre - p["threshold"]).abs() < half).to(pre.dtype)
        f = (pre * active).bfloat16()
        error = f @ p["w_dec"] + p["b_dec"] - x
        d_x_hat = error * (2 / len(x))
        d_f = d_x_hat @ p["w_dec"].T
        d_pre = (d_f * active).bfloat16()
        d_b_enc = d_pre.sum(0, dtype=torch.float32)
        near_d_f = (d_f * near).sum(0, dtype=torch.float32)
        gradients = {
            "w_enc": (d_pre.T @ centred).T.float(),
            "w_dec": (f.T @ d_x_hat).float(),
            "b_enc": d_b_enc,
            "b_dec": d_x_hat.sum(0, dtype=torch.float32) - (p["w_enc"] @ d_b_enc).float(),
            "threshold": (p["threshold"] * near_d_f + near.sum(0, dtype=torch.float32) * (COEFFICIENT / len(x)))
            / -RECIPE.bandwidth,
        }
    gradients["w_dec"] = without_parallel_part(gradients["w_dec"], p["w_dec"])
    for name in TENSORS:
        v[name].mul_(RECIPE.beta2).addcmul_(gradients[name], gradients[name], value=1 - RECIPE.beta2)
        p[name].sub_(RECIPE.learning_rate * gradients[name] / ((v[name] * correction).sqrt() + RECIPE.epsilon))
    p["w_dec"].copy_(unit_rows(p["w_dec"]))
    p["threshold"].clamp_(min=0)
    return error.square().sum() / len(x), active.sum(dtype=torch.float32) / len(x)


class Pairs:
    """The engine, past its dense beginning."""

    def __init__(self, sae: TrainableSae, max_pairs: int | None = None) -> None:
        """For `sae`, which changes in place; lists have room for `max_pairs`, or for what the engine gives them."""
        self.sae, self.steps_done = sae, 0
        self.engine = GpuPairs([sae], max_pairs)
        self.engine.tensors()["uses_pairs"].fill_(True)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        (self.losses,) = self.engine.step(x, self.steps_done, STEPS)
        self.steps_done += 1


class Dense:
    """The baseline."""

    def __init__(self, sae: TrainableSae, compiled: bool) -> None:
        """For `sae`, which changes in place."""
        self.sae, self.steps_done = sae, 0
        self.update = torch.compile(dense_step) if compiled else dense_step

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """One step."""
        correction = torch.full((), 1 / (1 - RECIPE.beta2 ** (self.steps_done + 1)), device=x.device)
        self.losses = self.update(self.sae.parameters, self.sae.squared, x, correction)
        self.steps_done += 1


def check_agreement(d_in: int, width: int, batch: int, l0: float, device: str, compiled: bool) -> dict[str, float]:
    """The largest relative difference of a step's gradients (the roots of Adam's fresh means) from dense float32, of each way."""
    sae, x = sae_with_l0(d_in, width, l0, device), rows_of(batch, d_in, device, seed=0)
    oracle = copy_of(sae)
    dense_update(oracle, x, 0, STEPS)
    worst = {}
    # In float32 only sums differ, and pairs within rounding of a border. In bfloat16 many pairs near a border change sides.
    # At this width the L0 is far beyond what steps by pairs are taken for, so that their lists need more room than usual.
    for name, way, allowed in (
        ("pairs", Pairs(copy_of(sae), max_pairs=batch * width // 4), 1e-3),
        ("dense_bf16", Dense(copy_of(sae), compiled), 0.3),
    ):
        way(x)
        roots = {key: (way.sae.squared[key].sqrt(), oracle.squared[key].sqrt()) for key in TENSORS}
        worst[name] = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in roots.values())
        if not worst[name] < allowed:
            sys.exit(
                f"{name} differs from the dense step in float32 by {worst[name]:.2g} at d_in={d_in}: no timing is worth reading"
            )
    return worst


def seconds(call: Callable[[], object], calls: int, on_cuda: bool) -> float:
    """Mean time of a call, on the device's own clock where there is one."""
    if not on_cuda:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(calls):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / calls / 1e3


def built(make: Callable[[], Way], x: Tensor, on_cuda: bool) -> tuple[Way, int] | None:
    """A way that has warmed up, and its peak memory in bytes; None where the device has not enough."""
    if not on_cuda:
        way = make()
        way(x)
        return way, 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        way = make()
        for _ in range(3):
            way(x)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        way = None
    if way is None:
        torch.cuda.empty_cache()
        return None
    return way, torch.cuda.max_memory_allocated() - before


def bytes_of(way: Pairs, batch: int, d_in: int) -> float:
    """What a step by pairs must move: the screen's factor and its bits, rows of touched latents, and gathers at pairs.

    A touched latent's rows: w_enc for pre-activations and for b_dec, w_dec for d_f, and in the update four tensors read and
    written, w_dec once more for its norm, the rounded copy. Gathers, most from the second-level cache: x where the screen let a
    pair through; w_dec, error, x and error again where it is one.
    """
    width = way.sae.config.width
    touched = float((way.sae.touched == way.steps_done).sum())
    pairs, listed = float(way.losses.pairs) * batch, float(way.engine.tensors()["counts"][(way.steps_done - 1) % 8].sum())
    return 2 * width * d_in + 6 * width * batch / 8 + touched * d_in * (3 * 4 + 10 * 4 + 2) + 4 * d_in * (listed + 4 * pairs)


def measure(d_in: int, width: int, options: argparse.Namespace, device: str) -> dict[str, float | None]:
    """Median times of a size, ratios by round, and what follows from them."""
    on_cuda, batch = device == "cuda", options.batch
    x = rows_of(batch, d_in, device, seed=2)
    found = built(lambda: Pairs(sae_with_l0(d_in, width, options.l0, device)), x, on_cuda)
    if found is None:
        return {"d_in": d_in, "width": width}
    pairs, pairs_memory = found
    dense, dense_memory = built(lambda: Dense(sae_with_l0(d_in, width, options.l0, device), on_cuda), x, on_cuda) or (None, None)
    rounded, w_rounded = x.bfloat16(), pairs.engine._screened[0].parts[0]
    chunk = max(1024, (1 << 24) // batch // 1024 * 1024)

    def product() -> None:
        for first in range(0, width, chunk):
            torch.mm(rounded, w_rounded[first : first + chunk].T)

    ways = {"pairs": lambda: pairs(x), "product": product} | ({"dense": lambda: dense(x)} if dense else {})
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, call in ways.items():
            times[name].append(seconds(call, options.calls, on_cuda))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = [slow / fast for slow, fast in zip(times.get("dense", []), times["pairs"], strict=False)]
    flops = 2 * batch * d_in * width
    peak = next((value for name, value in PEAKS.items() if on_cuda and name in torch.cuda.get_device_name()), None)
    return {
        "d_in": d_in,
        "width": width,
        "pairs_ms": median["pairs"] * 1e3,
        "dense_ms": median["dense"] * 1e3 if dense else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratio_least": min(ratios, default=None),
        "ratio_most": max(ratios, default=None),
        "product_ms": median["product"] * 1e3,
        "product_share": median["product"] / median["pairs"],
        "product_tflops": flops / median["product"] / 1e12,
        "product_of_peak": flops / median["product"] / peak if peak else None,
        "dense_equivalent_of_peak": 5 * flops / median["pairs"] / peak if peak else None,
        "counted_gb_per_s": bytes_of(pairs, batch, d_in) / median["pairs"] / 1e9,
        "pairs_gb": pairs_memory / 1e9,
        "dense_gb": None if dense_memory is None else dense_memory / 1e9,
        "l0": float(pairs.losses.l0),
        "pairs_per_row": float(pairs.losses.pairs),
        "listed_per_row": float(pairs.engine.tensors()["counts"][(pairs.steps_done - 1) % 8].sum()) / batch,
        "skipped": int(pairs.engine.tensors()["skipped"].sum()),
    }


LINES = {
    "pairs_ms": "by pairs, ms",
    "dense_ms": "dense bf16, compiled, ms",
    "ratio": "dense / pairs",
    "ratio_least": "  least of rounds",
    "ratio_most": "  most of rounds",
    "product_ms": "encoder product alone, ms",
    "product_share": "  share of the step by pairs",
    "product_tflops": "  TFLOP/s",
    "product_of_peak": "  share of peak",
    "dense_equivalent_of_peak": "five such products in a step by pairs, share of peak",
    "counted_gb_per_s": "counted bytes, GB/s",
    "pairs_gb": "peak memory by pairs, GB",
    "dense_gb": "peak memory dense, GB",
    "l0": "L0",
    "pairs_per_row": "pairs per row",
    "listed_per_row": "listed by the screen per row",
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=10, help="steps in a round")
    parser.add_argument("--only", nargs="*", help="sizes as d_in x width: 3584x131072")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter; times mean nothing")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.only] if options.only else SIZES
    if options.interpret:
        device, sizes, options.batch, options.l0, options.rounds, options.calls = "cpu", ((3584, 70),), 16, 5.0, 1, 1
    elif torch.cuda.is_available():
        device = "cuda"
    else:
        print("training_gpu measures a CUDA device, and torch sees none here; --interpret shows that it runs.")
        return
    checks = {}
    for d_in in dict.fromkeys(d_in for d_in, _ in sizes):
        checks[d_in] = check_agreement(
            d_in, 70 if options.interpret else 8192, options.batch, options.l0, device, device == "cuda"
        )
    results = []
    for d_in, width in sizes:
        results.append(measure(d_in, width, options, device))
        if device == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    about = {"device": name, "torch": torch.__version__, "batch": options.batch, "rounds": options.rounds, "calls": options.calls}
    if options.json:
        print(json.dumps({**about, "command": " ".join(sys.argv), "agreement": checks, "results": results}, indent=2))
        return
    console = Console()
    console.print(
        table_of(results, f"{name}, torch {torch.__version__}, batch {options.batch}; medians of {options.rounds} rounds")
    )
    for d_in, worst in checks.items():
        differences = ", ".join(f"{way} {value:.1e}" for way, value in worst.items())
        console.print(f"d_in {d_in}: one step's gradients differ from the dense step in float32 by: {differences}")


if __name__ == "__main__":
    main()
