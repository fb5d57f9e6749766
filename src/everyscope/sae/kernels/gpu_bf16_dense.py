"""The dense way's kernels on a GPU, in bfloat16: what lies between its five products, each in one pass over [batch, d_sae]."""

# pyright: reportInvalidTypeForm=false
# Triton may be missing, so that `constexpr` is a variable.

import torch
from jaxtyping import BFloat16, Float32, Int32
from torch import Tensor

from everyscope.sae.kernels.gpu_bf16 import pair_at
from everyscope.sae.kernels.gpu_triton import blocks, constexpr, jit, tl, to_bfloat16

ROWS_BY = 256
"""Rows that one program sums over [rows]."""


@jit
def _activate(product, b_enc, threshold, f, counts, rows, width, half, by: constexpr, tile_rows: constexpr, tile: constexpr):
    latent = tl.program_id(0) * tile + tl.arange(0, tile)
    known = latent < width
    level = tl.load(threshold + latent, known, other=0.0)[None, :]
    bias = tl.load(b_enc + latent, known, other=0.0)[None, :]
    num_pairs = tl.zeros([tile], tl.int32)
    num_active = tl.zeros([tile], tl.int32)
    num_near = tl.zeros([tile], tl.int32)
    for first in range(0, by, tile_rows):
        row = tl.program_id(1) * by + first + tl.arange(0, tile_rows)
        inside = (row < rows)[:, None] & known[None, :]
        at = row[:, None].to(tl.int64) * width + latent[None, :]
        pre = tl.load(product + at, inside, other=0.0).to(tl.float32) + bias
        active, near = pair_at(pre, level, half)
        tl.store(f + at, to_bfloat16(tl.where(active, pre, 0.0)), inside)
        num_pairs += tl.sum((inside & (active | near)).to(tl.int32), 0)
        num_active += tl.sum((inside & active).to(tl.int32), 0)
        num_near += tl.sum((inside & near).to(tl.int32), 0)
    at = counts + tl.program_id(1) * 3 * width + latent
    tl.store(at, num_pairs, known)
    tl.store(at + width, num_active, known)
    tl.store(at + 2 * width, num_near, known)


@jit
def _differentiate(d_f, product, b_enc, threshold, sums, rows, width, half, by: constexpr, tile_rows: constexpr, tile: constexpr):
    latent = tl.program_id(0) * tile + tl.arange(0, tile)
    known = latent < width
    level = tl.load(threshold + latent, known, other=0.0)[None, :]
    bias = tl.load(b_enc + latent, known, other=0.0)[None, :]
    sum_active = tl.zeros([tile], tl.float32)
    sum_near = tl.zeros([tile], tl.float32)
    for first in range(0, by, tile_rows):
        row = tl.program_id(1) * by + first + tl.arange(0, tile_rows)
        inside = (row < rows)[:, None] & known[None, :]
        at = row[:, None].to(tl.int64) * width + latent[None, :]
        pre = tl.load(product + at, inside, other=0.0).to(tl.float32) + bias
        active, near = pair_at(pre, level, half)
        g = tl.load(d_f + at, inside, other=0.0).to(tl.float32)
        sent = tl.where(active, g, 0.0)
        tl.store(d_f + at, to_bfloat16(sent), inside)
        sum_active += tl.sum(sent, 0)
        sum_near += tl.sum(tl.where(near, g, 0.0), 0)
    at = sums + (tl.program_id(1) * width + latent) * 2
    tl.store(at, sum_active, known)
    tl.store(at + 1, sum_near, known)


def activate(
    pre: BFloat16[Tensor, "batch d_sae"],
    b_enc: Float32[Tensor, " d_sae"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
    f: BFloat16[Tensor, "batch d_sae"],
) -> Int32[Tensor, "3 d_sae"]:
    """Fill in all activations; each latent's pairs, active and near ones."""
    rows, width = pre.shape
    counts = torch.empty(blocks(rows, ROWS_BY), 3, width, dtype=torch.int32, device=pre.device)
    _activate[(blocks(width, 256), len(counts))](
        pre, b_enc, threshold, f, counts, rows, width, bandwidth / 2, ROWS_BY, 8, 256, num_warps=1
    )
    return counts.sum(0, dtype=torch.int32)


def differentiate(
    d_f: BFloat16[Tensor, "batch d_sae"],
    pre: BFloat16[Tensor, "batch d_sae"],
    b_enc: Float32[Tensor, " d_sae"],
    threshold: Float32[Tensor, " d_sae"],
    bandwidth: float,
) -> Float32[Tensor, "d_sae 2"]:
    """Zero `d_f` where latents are silent; its sums over rows where they are active, and where they are near."""
    rows, width = pre.shape
    sums = torch.empty(blocks(rows, ROWS_BY), width, 2, device=pre.device)
    _differentiate[(blocks(width, 256), len(sums))](
        d_f, pre, b_enc, threshold, sums, rows, width, bandwidth / 2, ROWS_BY, 8, 256, num_warps=1
    )
    return sums.sum(0)
