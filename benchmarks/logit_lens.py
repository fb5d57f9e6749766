"""Latents per second of the logit lens at a large vocabulary: the screened search beside whole products and torch's top-k.

    python benchmarks/logit_lens.py                                    # random weights, 262,144 tokens, d_model 640
    python benchmarks/logit_lens.py --model google/gemma-3-270m        # a model's own unembedding, through its final norm
    python benchmarks/logit_lens.py --vocab 2000 --latents 64          # seconds: for a smoke test

Seconds of the process' own CPU time are printed beside wall seconds: on a shared machine only the former can be compared.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everyscope.describe.directions import TOP_LOGITS
from everyscope.describe.lens import Ends, Lens
from everyscope.sites.config import ModelConfig
from everyscope.sites.logits import logit_path
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site

WHOLE_CHUNK = 64
"""Latents whose products with all tokens were held at once before there was a screen [latents]."""


def main() -> None:
    """Measure both and compare what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="a model of Hugging Face, or its folder; without one the weights are random"
    )
    parser.add_argument("--layer", type=int, default=0, help="layer of the residual stream, with --model")
    parser.add_argument("--vocab", type=int, default=2**18, help="tokens of random weights [tokens]")
    parser.add_argument("--d-model", type=int, default=640, help="width of random weights")
    parser.add_argument("--latents", type=int, default=2048, help="directions to look at [latents]")
    parser.add_argument("--whole-latents", type=int, default=64, help="directions that whole products are timed on [latents]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    unembedding, directions = _problem(options)
    table = Table("threads", "search", "latents/s", "latents per CPU second", "same tokens", "largest difference [1]")
    for threads in options.threads:
        torch.set_num_threads(threads)
        lens, wall, cpu = _timed(lambda: Lens(unembedding, len(unembedding)))
        table.add_row(str(threads), f"prepared once, in {lens._dtype}", f"{wall:.2f} s", f"{cpu:.2f} s", "", "")
        lens.ends(directions[:8], TOP_LOGITS)  # compiles
        found, *screened = _timed(lambda: lens.ends(directions, TOP_LOGITS))  # noqa: B023
        few = directions[: options.whole_latents]
        want, *whole = _timed(lambda: whole_products(unembedding, few))  # noqa: B023
        same = float((found.tokens[: len(few)] == want.tokens).mean())
        difference = float(np.abs(found.values[: len(few)] / want.values - 1).max())
        table.add_row("", "screened", *_rates(len(directions), *screened), f"{same:.4%}", f"{difference:.1e}")
        table.add_row("", "whole products", *_rates(len(few), *whole), "", "")
    Console().print(table)


def whole_products(unembedding: Tensor, directions: Tensor) -> Ends:
    """Both ends by whole float32 products and torch's top-k, a chunk of latents at a time."""
    tokens, values = [], []
    for start in range(0, len(directions), WHOLE_CHUNK):
        products = directions[start : start + WHOLE_CHUNK] @ unembedding.T
        ends = [products.topk(TOP_LOGITS, dim=1, largest=is_largest) for is_largest in (True, False)]
        tokens.append(torch.stack([end.indices for end in ends], 1))
        values.append(torch.stack([end.values for end in ends], 1))
    return Ends(torch.cat(tokens).numpy().astype(np.int32), torch.cat(values).numpy())


def _problem(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The unembedding, and directions as they meet it."""
    generator = torch.Generator().manual_seed(0)
    if options.model is None:
        unembedding = torch.randn(options.vocab, options.d_model, generator=generator)
        return unembedding, torch.randn(options.latents, options.d_model, generator=generator)
    path = logit_path(load_language_model(ModelConfig(name=options.model)).model, Site("resid_post", options.layer))
    width = path.unembedding.shape[1]
    return path.unembedding.float(), path.through_norms(torch.randn(options.latents, width, generator=generator)).detach()


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, with its seconds of wall and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _rates(latents: int, wall: float, cpu: float) -> tuple[str, str]:
    return f"{latents / wall:,.0f}", f"{latents / cpu:,.0f}"


if __name__ == "__main__":
    main()
