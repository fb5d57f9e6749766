"""The bfloat16 step's forward half on a GPU: one product, kept whole, decides the pairs and holds their values.

As trainers under autocast have it, a pre-activation is the bfloat16 product, accumulated in float32, plus a float32 bias. What is
active or near is decided by that number alone and by the same expression everywhere, so that lists hold the pairs and nothing
else. Each number is summed by one program, in an order that sizes alone decide: no atomics, the same bits on every run.
"""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import BFloat16, Float32, Int32, Int64
from torch import Tensor

from everyscope.sae.kernels.gpu import lowest_bits, popcount
from everyscope.sae.kernels.gpu_triton import blocks, constexpr, jit, tl


@contextmanager
def float32_sums() -> Iterator[None]:
    """Products within are accumulated in float32 throughout: parts of a product may else be added in bfloat16."""
    settings = torch.backends.cuda.matmul
    allowed, settings.allow_bf16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction, False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = allowed


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left` @ `right`, bfloat16 both, accumulated in float32, in the type of `out`.

    Within `float32_sums` a GPU rounds once, at the end; so does this on a CPU.
    """
    if left.device.type != "cuda":
        return out.copy_(left.float() @ right.float())
    return torch.mm(left, right, out=out) if out.dtype == left.dtype else torch.mm(left, right, out.dtype, out=out)


@jit
def pair_at(pre, level, half):
    """Whether a pre-activation is active and whether it is near its threshold; what is not a number is active."""
    return ~(pre <= level), tl.abs(pre - level) < half


@jit
def _mark(
    product, b_enc, threshold, by_row, by_latent, rows, width, row_words, latent_words, half, tile_rows: constexpr,
    tile_latents: constexpr,
):  # fmt: skip
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    latent = tl.program_id(0) * tile_latents + tl.arange(0, tile_latents)
    in_rows = row < rows
    in_latents = latent < width
    inside = in_rows[:, None] & in_latents[None, :]
    pre = tl.load(product + row[:, None].to(tl.int64) * width + latent[None, :], inside, other=0.0).to(tl.float32)
    pre += tl.load(b_enc + latent, in_latents, other=0.0)[None, :]
    active, near = pair_at(pre, tl.load(threshold + latent, in_latents, other=0.0)[None, :], half)
    bits = (inside & (active | near)).to(tl.int32)
    lanes = tl.arange(0, 32)
    words = tl.sum(tl.reshape(bits, [tile_rows, tile_latents // 32, 32]) << lanes[None, None, :], 2)
    word = tl.program_id(0) * (tile_latents // 32) + tl.arange(0, tile_latents // 32)
    tl.store(
        by_row + row[:, None].to(tl.int64) * row_words + word[None, :], words, in_rows[:, None] & (word < row_words)[None, :]
    )
    words = tl.sum(tl.reshape(bits, [tile_rows // 32, 32, tile_latents]) << lanes[None, :, None], 1)
    word = tl.program_id(1) * (tile_rows // 32) + tl.arange(0, tile_rows // 32)
    at = by_latent + latent[None, :].to(tl.int64) * latent_words + word[:, None]
    tl.store(at, words, in_latents[None, :] & (word < latent_words)[:, None])


def mark_pairs(
    pre: BFloat16[Tensor, "batch d_sae"],
    b_enc: Float32[Tensor, " d_sae"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    by_row: Int32[Tensor, "batch row_words"],
    by_latent: Int32[Tensor, "d_sae latent_words"],
) -> None:
    """Mark every pair with one bit, by row and by latent; `pre` is without the bias."""
    rows, width = pre.shape
    _mark[(blocks(width, 64), blocks(rows, 64))](
        pre, b_enc, threshold, by_row, by_latent, rows, width, by_row.shape[1], by_latent.shape[1], bandwidth / 2, 64, 64
    )


@jit
def _list_by_row(bits, start, latent_of, pre_of, product, b_enc, rows, width, words, lines: constexpr, tile: constexpr):
    row = tl.program_id(0) * lines + tl.arange(0, lines)
    known = row < rows
    at = tl.load(start + row, known, other=0)
    listed = known & (at < tl.load(start + row + 1, known, other=0))
    if tl.max(listed.to(tl.int32), 0) > 0:
        for first in range(0, words, tile):
            word = first + tl.arange(0, tile)
            taken = listed[:, None] & (word < words)[None, :]
            left = tl.load(bits + row[:, None].to(tl.int64) * words + word[None, :], taken, other=0)
            count = popcount(left)
            to = at[:, None] + tl.cumsum(count, 1) - count
            at += tl.sum(count, 1)
            while tl.max(tl.max((left != 0).to(tl.int32), 1), 0) > 0:
                latent = word[None, :] * 32 + lowest_bits(left)
                pre = tl.load(product + row[:, None].to(tl.int64) * width + latent, left != 0, other=0.0).to(tl.float32)
                tl.store(latent_of + to, latent, left != 0)
                tl.store(pre_of + to, pre + tl.load(b_enc + latent, left != 0, other=0.0), left != 0)
                to += (left != 0).to(tl.int64)
                left = left & (left - 1)


@jit
def _list_by_latent(
    bits, start, row_of, pre_of, product, b_enc, threshold, pairs_out, active_out, near_out, further_out, width, words, half,
    segment, lines: constexpr, tile: constexpr,
):  # fmt: skip
    latent = tl.program_id(0) * lines + tl.arange(0, lines)
    known = latent < width
    at = tl.load(start + latent, known, other=0)
    pairs = tl.load(start + latent + 1, known, other=0) - at
    level = tl.load(threshold + latent, known, other=0.0)[:, None]
    bias = tl.load(b_enc + latent, known, other=0.0)[:, None]
    num_active = tl.zeros([lines], tl.int32)
    num_near = tl.zeros([lines], tl.int32)
    if tl.max(pairs, 0) > 0:
        for first in range(0, words, tile):
            word = first + tl.arange(0, tile)
            taken = (known & (pairs > 0))[:, None] & (word < words)[None, :]
            left = tl.load(bits + latent[:, None].to(tl.int64) * words + word[None, :], taken, other=0)
            count = popcount(left)
            to = at[:, None] + tl.cumsum(count, 1) - count
            at += tl.sum(count, 1)
            while tl.max(tl.max((left != 0).to(tl.int32), 1), 0) > 0:
                row = word[None, :] * 32 + lowest_bits(left)
                on = left != 0
                pre = tl.load(product + row.to(tl.int64) * width + latent[:, None], on, other=0.0).to(tl.float32) + bias
                active, near = pair_at(pre, level, half)
                num_active += tl.sum((on & active).to(tl.int32), 1)
                num_near += tl.sum((on & near).to(tl.int32), 1)
                tl.store(row_of + to, row, on)
                tl.store(pre_of + to, pre, on)
                to += on.to(tl.int64)
                left = left & (left - 1)
    tl.store(pairs_out + latent, pairs.to(tl.int32), known)
    tl.store(active_out + latent, num_active, known)
    tl.store(near_out + latent, num_near, known)
    tl.store(further_out + latent, tl.maximum(pairs - 1, 0) // segment, known)


def list_pairs(
    pre: BFloat16[Tensor, "batch d_sae"],
    b_enc: Float32[Tensor, " d_sae"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    by_row: tuple[Int32[Tensor, "batch row_words"], Int64[Tensor, " batch_1"], Int32[Tensor, " room"], Float32[Tensor, " room"]],
    by_latent: tuple[
        Int32[Tensor, "d_sae latent_words"], Int64[Tensor, " d_sae_1"], Int32[Tensor, " room"], Float32[Tensor, " room"]
    ],
    counts: Int32[Tensor, "3 d_sae"],
    further: Int64[Tensor, " d_sae"],
    segment: int,
) -> None:
    """Read both lists off the marks: (marks, where each line begins, what it meets, pre-activation with its bias).

    `counts` gets each latent's pairs, active and near ones; `further` its segments of `segment` pairs beyond the first. Nothing
    is listed or counted where the beginnings are all zero.
    """
    rows, width = pre.shape
    marks, start, latent_of, pre_of = by_row
    lines, tile = (8, 128) if marks.shape[1] <= 128 else (2, 512)
    _list_by_row[(blocks(rows, lines),)](marks, start, latent_of, pre_of, pre, b_enc, rows, width, marks.shape[1], lines, tile)
    marks, start, row_of, pre_of = by_latent
    lines, tile = (8, 128) if marks.shape[1] <= 128 else (2, 512)
    _list_by_latent[(blocks(width, lines),)](
        marks, start, row_of, pre_of, pre, b_enc, threshold, *counts, further, width, marks.shape[1], bandwidth / 2, segment,
        lines, tile,
    )  # fmt: skip
