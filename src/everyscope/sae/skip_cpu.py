"""A transcoder's skip beside the pair path on the CPU: dense products, cut into fixed blocks so that threads change no bit."""

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.kernels.cpu import SUM_ROWS
from everyscope.sae.kernels.cpu_update import Adam, update_always

BLOCK = 64
"""Inputs whose rows of w_skip one thread moves at a time."""


def subtract_skip(
    left: Float[Tensor, "batch d_out"],
    target: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"],
    w_skip: Float[Tensor, "d_in d_out"],
    rows: range,
) -> None:
    """Fill in `rows` of `left`, which begin at a multiple of SUM_ROWS: `functional.without_skip` of these."""
    for start in range(rows.start, rows.stop, SUM_ROWS):
        block = slice(start, min(start + SUM_ROWS, rows.stop))
        torch.addmm(target[block], x[block], w_skip, alpha=-1, out=left[block])


def blocks_of(w_skip: Float[Tensor, "d_in d_out"]) -> list[slice]:
    """The rows of w_skip in pieces for threads."""
    return [slice(start, min(start + BLOCK, len(w_skip))) for start in range(0, len(w_skip), BLOCK)]


def move_skip(
    adam: Adam,
    w_skip: Float[Tensor, "d_in d_out"],
    squared: Float[Tensor, "d_in d_out"],
    x: Float[Tensor, "batch d_in"],
    d_y_hat: Float[Tensor, "batch d_out"],
    block: slice,
) -> None:
    """Move these rows of w_skip along their gradient x.T @ d_y_hat, in place."""
    gradient = torch.mm(x[:, block].T, d_y_hat)
    update_always(adam, w_skip[block].view(-1).numpy(), gradient.view(-1).numpy(), squared[block].view(-1).numpy())
