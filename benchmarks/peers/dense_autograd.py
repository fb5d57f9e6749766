"""The baseline: the recipe as one would write it down first, with autograd and torch.optim.Adam, all products dense.

Initial values and schedules are everyscope's, so that both train the same SAE; the arithmetic of a step is this file's own.
"""

from typing import Any

import torch
from torch import Tensor

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.schedules import learning_rate_share, sparsity_weight
from everyscope.sae.trainable import new_sae
from peers.worker import Rows, Settings, serve, threshold_for

RECIPE: dict[str, Any] = {
    "learning_rate": 3e-3,
    "learning_rate_warmup_steps": 20,
    "learning_rate_decay": 0.3,
    "bandwidth": 0.05,
    "encoder_scale": 0.5,
}
"""The paper's loss, with what lets it come to something within some hundred steps."""


def config_of(settings: Settings, d_in: int) -> SaeConfig:
    """The SAE to train; every knob but `coefficient` is a field of SaePreset."""
    knobs: dict[str, Any] = dict(settings.knobs)
    coefficient = knobs.pop("coefficient", 1e-3)
    # 0.1 at a d_in of 128, and what as many first pre-activations pass at others: they have size 1 / sqrt(d_in).
    start: dict[str, Any] = {"initial_threshold": 0.1 * (128 / d_in) ** 0.5, "sparsity_warmup_steps": settings.steps // 4}
    preset = SaePreset(**start | RECIPE | knobs)
    return SaeConfig(width=settings.width, sparsity_coefficient=coefficient, seed=settings.seed, preset=preset)


class JumpRelu(torch.autograd.Function):
    """The activation, with its straight-through derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        """Pre-activations that are above their threshold."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, out):
        """By pre-activation and threshold."""
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).float()
        return out * (pre > threshold), (-(threshold / ctx.bandwidth) * near * out).sum(0), None


class Step(torch.autograd.Function):
    """The count of active latents, with its straight-through derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        """1 where active."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).float()

    @staticmethod
    def backward(ctx, out):
        """By the threshold alone."""
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).float()
        return None, (-(1 / ctx.bandwidth) * near * out).sum(0), None


class DenseAutograd:
    """An SAE whose gradients autograd finds."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE, of the same initial values as everyscope's."""
        self._config, self._steps, self._done = config_of(settings, rows.d_in), settings.steps, 0
        start = new_sae(self._config, rows.d_in).parameters
        self.parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        preset = self._config.preset
        self._optimiser = torch.optim.Adam(
            self.parameters.values(), lr=preset.learning_rate, betas=(0.0, preset.beta2), eps=preset.epsilon
        )

    def _pre(self, rows: Tensor) -> Tensor:
        p = self.parameters
        return (rows - p["b_dec"]) @ p["W_enc"] + p["b_enc"]

    def step(self, rows: Tensor) -> None:
        """Loss, backward, projection of the decoder's gradient, Adam, unit decoder rows, thresholds not below zero."""
        p, bandwidth = self.parameters, self._config.preset.bandwidth
        pre = self._pre(rows)
        x_hat = JumpRelu.apply(pre, p["threshold"], bandwidth) @ p["W_dec"] + p["b_dec"]
        l0 = Step.apply(pre, p["threshold"], bandwidth).sum(1).mean()
        loss = (rows - x_hat).square().sum(1).mean() + sparsity_weight(self._config, self._done) * l0
        self._optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec, gradient = p["W_dec"], p["W_dec"].grad
            assert gradient is not None
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
            share = learning_rate_share(self._config.preset, self._done, self._steps)
            self._optimiser.param_groups[0]["lr"] = self._config.preset.learning_rate * share
            self._optimiser.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            p["threshold"].clamp_(min=0)
        self._done += 1

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Without gradients."""
        p, pre = self.parameters, self._pre(rows)
        f = pre * (pre > p["threshold"])
        return f @ p["W_dec"] + p["b_dec"], f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        self.parameters["threshold"].fill_(threshold_for(self._pre(rows), l0))


if __name__ == "__main__":
    serve(DenseAutograd, "torch")
