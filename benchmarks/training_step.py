"""One training step of one SAE: ours against the same step written with autograd and torch.optim.Adam, in one run.

The baseline is the paper's recipe as one would write it down first: custom autograd functions for the straight-through
gradients, Adam, projection and unit norm. Rounds alternate, so that a machine whose speed drifts slows both. Prints a line
per size and, with --json, the same as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from everyscope.sae.config import SaeConfig, SaeRecipe
from everyscope.sae.functional import unit_rows, without_parallel_part
from everyscope.sae.trainable import TENSORS, dense_update, new_sae

COEFFICIENT, BANDWIDTH, THRESHOLD, RATE = 2.5e-3, 0.05, 0.15, 1e-4
SIZES = ((256, 128, 1024), (1024, 128, 4096), (1024, 512, 4096))
"""Rows, d_in and latents of each measurement."""


class JumpRelu(torch.autograd.Function):
    """The activation, with its straight-through derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold):
        """Pre-activations that are above their threshold."""
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, out):
        """By pre-activation and threshold."""
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).float()
        return out * (pre > threshold), (-(threshold / BANDWIDTH) * near * out).sum(0)


class Step(torch.autograd.Function):
    """The count of active latents, with its straight-through derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold):
        """1 where active."""
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).float()

    @staticmethod
    def backward(ctx, out):
        """By the threshold alone."""
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).float()
        return None, (-(1 / BANDWIDTH) * near * out).sum(0)


def autograd_step(config: SaeConfig, d_in: int) -> Callable[[torch.Tensor], None]:
    """A training step of the baseline, which holds its own parameters."""
    p = {name: tensor.clone().requires_grad_() for name, tensor in new_sae(config, d_in).parameters.items()}
    optimiser = torch.optim.Adam(p.values(), lr=RATE, betas=(0.0, 0.999), eps=1e-8)

    def step(x: torch.Tensor) -> None:
        pre = (x - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
        x_hat = JumpRelu.apply(pre, p["threshold"]) @ p["w_dec"] + p["b_dec"]
        loss = (x - x_hat).square().sum(1).mean() + COEFFICIENT * Step.apply(pre, p["threshold"]).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        p["w_dec"].grad = without_parallel_part(p["w_dec"].grad, p["w_dec"].detach())
        optimiser.step()
        with torch.no_grad():
            p["w_dec"].copy_(unit_rows(p["w_dec"]))
            p["threshold"].clamp_(min=0)

    step.parameters = p  # for the check that both do the same
    return step


def measure(rows: int, d_in: int, width: int, rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds of both steps and their ratio, round by round; checks first that they agree."""
    recipe = SaeRecipe(
        learning_rate=RATE,
        learning_rate_warmup_steps=0,
        sparsity_warmup_steps=0,
        bandwidth=BANDWIDTH,
        initial_threshold=THRESHOLD,
    )
    config = SaeConfig(width=width, sparsity_coefficient=COEFFICIENT, recipe=recipe)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    x /= x.square().sum(1).mean().sqrt()
    ours, theirs = new_sae(config, d_in), autograd_step(config, d_in)
    dense_update(ours, x, 0, 10**6)
    theirs(x)
    for name in TENSORS:
        torch.testing.assert_close(ours.parameters[name], theirs.parameters[name].detach(), rtol=1e-3, atol=1e-4)
    times: dict[str, list[float]] = {"closed_form": [], "autograd": []}
    for _ in range(rounds):
        for name, step in (("closed_form", lambda: dense_update(ours, x, 1, 10**6)), ("autograd", lambda: theirs(x))):
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - start) / calls * 1e3)
    ratios = [slow / fast for slow, fast in zip(times["autograd"], times["closed_form"], strict=True)]
    return {name: statistics.median(values) for name, values in times.items()} | {"ratio": statistics.median(ratios)}


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5, help="steps in a round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        {"rows": rows, "d_in": d_in, "width": width} | measure(rows, d_in, width, options.rounds, options.calls)
        for rows, d_in, width in SIZES
    ]
    if options.json:
        print(json.dumps({"threads": options.threads, "torch": torch.__version__, "results": results}, indent=2))
        return
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, float32")
    for row in results:
        sizes = f"rows {row['rows']:>5}  d_in {row['d_in']:>4}  width {row['width']:>5}"
        print(
            f"{sizes}   closed form {row['closed_form']:7.2f} ms   autograd {row['autograd']:7.2f} ms   ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
