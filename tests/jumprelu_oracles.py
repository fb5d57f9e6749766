"""The paper's pseudo-derivatives for autograd (arXiv 2407.14435), and its penalty."""

import torch


class OracleJumpRelu(torch.autograd.Function):
    """arXiv 2407.14435, eq. 11: the straight-through derivative by the threshold alone."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, out):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() / ctx.bandwidth < 0.5).to(pre)
        return out * (pre > threshold), (-(threshold / ctx.bandwidth) * kernel * out).sum(0), None


class OracleStep(torch.autograd.Function):
    """arXiv 2407.14435, eq. 12: the step on the pre-activation, which sends nothing to the encoder."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, out):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() / ctx.bandwidth < 0.5).to(pre)
        return torch.zeros_like(pre), (-(1 / ctx.bandwidth) * kernel * out).sum(0), None


def flat(coefficient):
    """The penalty of the paper's loss: every latent costs the same."""
    return lambda rates: torch.full_like(rates, coefficient)
