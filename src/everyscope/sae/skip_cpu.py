"""A transcoder's skip beside the pair path on the CPU: dense products, cut into fixed blocks so that threads change no bit.

Both products, what the skip predicts and its gradient, may be of bfloat16 numbers, which takes half the time: each term is then
within 2^-8 of itself, and each sum is rounded once more. The skip itself and Adam's means are float32 in any case.
"""

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from everyscope.sae.functional import without_skip
from everyscope.sae.kernels.cpu_update import Adam, update_always

BLOCK = 256
"""Rows, and inputs, that one thread takes at a time."""


def blocks_of(count: int) -> list[slice]:
    """[0, count) in pieces for threads."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def subtract_skip(
    left: Float[Tensor, "batch d_out"],
    target: Float[Tensor, "batch d_out"],
    x: Float[Tensor, "batch d_in"] | BFloat16[Tensor, "batch d_in"],
    w_skip: Float[Tensor, "d_in d_out"] | BFloat16[Tensor, "d_in d_out"],
    block: slice,
) -> None:
    """Fill in these rows of `left`: `functional.without_skip` of them."""
    if x.dtype == torch.bfloat16:
        torch.sub(target[block], torch.mm(x[block], w_skip), out=left[block])
    else:
        without_skip(x[block], target[block], w_skip, out=left[block])


def skip_gradient(
    x: Float[Tensor, "batch d_in"] | BFloat16[Tensor, "batch d_in"],
    d_y_hat: Float[Tensor, "batch d_out"] | BFloat16[Tensor, "batch d_out"],
    block: slice,
) -> Float[Tensor, "inputs d_out"]:
    """The gradient x.T @ d_y_hat of these rows of w_skip."""
    return torch.mm(x[:, block].T, d_y_hat).float()


def factor(tensor: Float[Tensor, "*shape"], is_rounded: bool) -> Float[Tensor, "*shape"] | BFloat16[Tensor, "*shape"]:
    """A factor of a skip's products, in the precision that these have."""
    return tensor.bfloat16() if is_rounded else tensor


def move_skip(
    adam: Adam,
    w_skip: Float[Tensor, "inputs d_out"],
    squared: Float[Tensor, "inputs d_out"],
    gradient: Float[Tensor, "inputs d_out"],
) -> None:
    """Move contiguous rows of w_skip along their gradient, in place."""
    update_always(adam, *(tensor.view(-1).numpy() for tensor in (w_skip, gradient, squared)))
