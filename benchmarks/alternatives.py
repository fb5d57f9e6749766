"""Other ways than numba kernels to do a step's sparse part on a CPU, timed in one run: what docs/log.md quotes.

All get the same code f [batch, d_sae], sparse, and do what follows the encoder's product: the reconstruction, the latents'
gradients at the pairs, and both weights' gradients; none of them takes Adam's step. everyscope's kernels do it all, Adam's too.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import embedding_bag

from everyscope.sae.config import SaeConfig
from everyscope.sae.presets import gemma_scope
from everyscope.sae.trainable import dense_update, new_sae
from everyscope.train.engines import engine_for

BATCH, D_IN, WIDTH, L0 = 2048, 384, 8192, 50


def with_dense_products(x: Tensor, f: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
    """Four dense products."""
    error = (f @ W_dec - x) * (2 / len(x))
    d_pre = (error @ W_dec.T) * (f > 0)
    return f.T @ error, d_pre.T @ x


def with_csr(x: Tensor, f: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
    """torch.sparse on CSR, which is MKL's: products with dense matrices, and one sampled at the pairs."""
    code = f.to_sparse_csr()
    error = (code @ W_dec - x) * (2 / len(x))
    zero = torch.sparse_csr_tensor(code.crow_indices(), code.col_indices(), torch.zeros_like(code.values()), code.shape)
    d_pre = torch.sparse.sampled_addmm(zero, error, W_dec.T)
    return transposed(code) @ error, transposed(d_pre) @ x


def transposed(matrix: Tensor) -> Tensor:
    """Of a CSR matrix, in CSR again."""
    return matrix.t().to_sparse_csr()


def with_embedding_bag(x: Tensor, f: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
    """embedding_bag for the reconstruction, autograd through it for the decoder and the latents; gathers for the encoder."""
    rows, latents = f.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(x)))
    values, weights = f[rows, latents].requires_grad_(), W_dec.detach().requires_grad_()
    x_hat = embedding_bag(latents, weights, starts, mode="sum", per_sample_weights=values)
    d_W_dec, d_f = torch.autograd.grad((x_hat - x).square().sum() / len(x), [weights, values])
    return d_W_dec, torch.zeros_like(W_dec).index_add_(0, latents, d_f[:, None] * x[rows])


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median milliseconds, after one call that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Check that all agree, then time them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR")
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    x /= x.square().sum(1).mean().sqrt()
    config = SaeConfig(width=WIDTH, sparsity_coefficient=1e-3, preset=gemma_scope())
    sae = new_sae(config, D_IN)
    pre = x @ sae.parameters["W_enc"]
    threshold = float(pre.flatten().topk(L0 * BATCH).values[-1])
    sae.parameters["threshold"].fill_(threshold)
    f, W_dec = pre * (pre > threshold), sae.parameters["W_dec"]
    ways = {"dense products": with_dense_products, "CSR (MKL)": with_csr, "embedding_bag": with_embedding_bag}
    want = with_dense_products(x, f, W_dec)
    table = Table("way", "ms", title=f"batch {BATCH}, d_in {D_IN}, width {WIDTH}, L0 {L0}, {options.threads} threads")
    for name, way in ways.items():
        for got, expected in zip(way(x, f, W_dec), want, strict=True):
            torch.testing.assert_close(got.to_dense() if got.layout != torch.strided else got, expected, rtol=1e-3, atol=1e-5)
        table.add_row(f"sparse part by {name}", f"{timed(lambda way=way: way(x, f, W_dec), options.rounds):.1f}")
    engine = engine_for("pairs", [sae], "cpu")
    table.add_row("whole step by pairs (numba)", f"{timed(lambda: engine.step(x, 10, 10**6), options.rounds):.1f}")
    rounded = x.bfloat16(), sae.parameters["W_enc"].bfloat16()
    table.add_row("  of which the product in bfloat16", f"{timed(lambda: rounded[0] @ rounded[1], options.rounds):.1f}")
    table.add_row("whole step dense, closed form", f"{timed(lambda: dense_update(sae, x, 10, 10**6), options.rounds):.1f}")
    try:
        compiled = torch.compile(dense_update)
        table.add_row("  the same, torch.compile", f"{timed(lambda: compiled(sae, x, 10, 10**6), options.rounds):.1f}")
    except Exception as error:
        table.add_row("  the same, torch.compile", f"fails: {type(error).__name__}")
    Console().print(table)


if __name__ == "__main__":
    main()
