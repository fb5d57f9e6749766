"""Logistic regression, fitted exactly: Newton's method on a strictly convex loss, in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from everyscope.base.errors import DataError

MAX_STEPS = 100
"""Newton steps; a handful suffice."""
TOLERANCE = 1e-10
"""The fit ends where no entry of the gradient is larger [nats]."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier of raw features: it says yes where x @ weight + bias > 0."""

    weight: Float64[Tensor, " k"]
    bias: Float64[Tensor, ""]

    def says_yes(self, x: Float64[Tensor, "n k"]) -> Bool[Tensor, " n"]:
        """Its verdict on each row."""
        return x.double() @ self.weight + self.bias > 0


def fit_probe(x: Float64[Tensor, "n k"], is_positive: Bool[Tensor, " n"], ridge: float) -> Probe:
    """The probe of least mean loss, both classes weighing one half, plus `ridge` / 2 times its squared coefficients.

    Features are standardised for the fit, so that the ridge means the same for all; the bias goes free. A feature that never
    varies gets no weight. DataError where one class has no row.
    """
    x, y = x.double(), is_positive.double()
    positives = int(is_positive.sum())
    if not 0 < positives < len(y):
        raise DataError(f"{positives} of {len(y)} rows are positive; a probe needs both classes, give more text")
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.inf)
    design = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    weights = torch.where(is_positive, 0.5 / positives, 0.5 / (len(y) - positives))
    penalty = torch.full((design.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 0
    coefficients = _newton(design, y, weights.double(), penalty)
    weight = coefficients[:-1] / spread
    return Probe(weight, coefficients[-1] - weight @ mean)


def _newton(
    design: Float64[Tensor, "n p"], y: Float64[Tensor, " n"], weights: Float64[Tensor, " n"], penalty: Float64[Tensor, " p"]
) -> Float64[Tensor, " p"]:
    """The minimum of the penalised loss. Steps are halved until the loss falls, so that separable data cannot run away."""

    def loss(at: Tensor) -> Tensor:
        scores = design @ at
        return weights @ (torch.nn.functional.softplus(scores) - y * scores) + penalty @ at.square() / 2

    at = torch.zeros(design.shape[1], dtype=torch.float64)
    reached = loss(at)
    for _ in range(MAX_STEPS):
        probability = torch.sigmoid(design @ at)
        gradient = design.T @ (weights * (probability - y)) + penalty * at
        if gradient.abs().max() <= TOLERANCE:
            break
        curvature = weights * probability * (1 - probability)
        hessian = (design * curvature[:, None]).T @ design + torch.diag(penalty)
        step = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        size = 1.0
        while (next_loss := loss(at - size * step)) > reached and size > 1e-6:
            size /= 2
        if size <= 1e-6:  # rounding alone is left
            break
        at, reached = at - size * step, next_loss
    return at
