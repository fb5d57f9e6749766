"""An SAE in training: five parameter tensors, their squared-gradient means, and one exact update.

The state lives on normalised activations, with the pre-encoder bias; `fold` turns it into what is published.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.config import SaeConfig
from everyscope.sae.folded import Sae
from everyscope.sae.functional import decode, jumprelu, loss_gradients, pre_activations, unit_rows, without_parallel_part
from everyscope.sae.schedules import learning_rate_share, sparsity_coefficient

TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


@dataclass(frozen=True)
class StepLosses:
    """What one update saw, left on the device: reading a value waits for it."""

    reconstruction: Float[Tensor, ""]
    """Mean ||x - x_hat||^2 over the batch, in normalised units."""
    l0: Float[Tensor, ""]
    """Mean number of active latents per row."""


@dataclass(frozen=True)
class TrainableSae:
    """The tensors of one SAE in training, changed in place by `dense_update`."""

    config: SaeConfig
    parameters: dict[str, Tensor]
    """w_enc [d_in, d_sae], w_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in], threshold [d_sae]; float32."""
    squared: dict[str, Tensor]
    """Adam's running mean of each parameter's squared gradient, of the same shapes."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Latent activations of normalised activations."""
        p = self.parameters
        return jumprelu(pre_activations(x - p["b_dec"], p["w_enc"], p["b_enc"]), p["threshold"])

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The reconstruction of normalised activations."""
        return decode(self.encode(x), self.parameters["w_dec"], self.parameters["b_dec"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by name; the tensors themselves, not copies."""
        return {name: self.parameters[name] for name in TENSORS} | {f"squared.{name}": self.squared[name] for name in TENSORS}


def new_sae(config: SaeConfig, d_in: int, device: str = "cpu") -> TrainableSae:
    """The SAE at step 0: He-uniform unit decoder rows, W_enc their transpose, zero biases, equal thresholds (section 3.2).

    Drawn on the CPU from `config.seed`, so that every device starts alike. He-uniform over a row is uniform in (-a, a), and
    a does not matter once rows have norm one.
    """
    generator = torch.Generator().manual_seed(config.seed)
    w_dec = unit_rows(torch.empty(config.width, d_in).uniform_(-1, 1, generator=generator))
    parameters = {
        "w_enc": (w_dec.T * config.recipe.encoder_scale).contiguous(),
        "w_dec": w_dec,
        "b_enc": torch.zeros(config.width),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((config.width,), config.recipe.initial_threshold),
    }
    on_device = {name: tensor.to(device) for name, tensor in parameters.items()}
    return TrainableSae(config, on_device, {name: torch.zeros_like(tensor) for name, tensor in on_device.items()})


@torch.no_grad()
def dense_update(sae: TrainableSae, x: Float[Tensor, "batch d_in"], step: int, steps: int) -> StepLosses:
    """One training step on normalised activations, in place: gradients, projection, Adam, unit decoder rows (section 3.2)."""
    recipe = sae.config.recipe
    gradients = loss_gradients(
        x, **sae.parameters, sparsity_coefficient=sparsity_coefficient(sae.config, step), bandwidth=recipe.bandwidth
    )
    share = learning_rate_share(recipe, step, steps)
    for name in TENSORS:
        parameter, gradient = sae.parameters[name], getattr(gradients, name)
        rate = recipe.learning_rate
        if name == "w_dec":
            gradient = without_parallel_part(gradient, parameter)
        if name == "threshold" and recipe.threshold_learning_rate is not None:
            rate = recipe.threshold_learning_rate
        adam_without_momentum(parameter, gradient, sae.squared[name], rate * share, recipe.beta2, recipe.epsilon, step)
    sae.parameters["w_dec"].copy_(unit_rows(sae.parameters["w_dec"]))
    # Below zero a threshold would let negative values pass, which the released form cannot express.
    sae.parameters["threshold"].clamp_(min=0)
    return StepLosses(gradients.reconstruction_loss, gradients.l0)


def adam_without_momentum(
    parameter: Tensor, gradient: Tensor, squared: Tensor, rate: float, beta2: float, epsilon: float, step: int
) -> None:
    """Adam with beta1 = 0 (arXiv 1412.6980, algorithm 1), in place; `step` counts from 0."""
    squared.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction = 1 - beta2 ** (step + 1)
    parameter.addcdiv_(gradient, (squared / correction).sqrt_().add_(epsilon), value=-rate)


def fold(sae: TrainableSae, scale: float) -> Sae:
    """The SAE on raw activations x_raw = scale * x, without pre-encoder bias (Gemma Scope, appendix A, eq. 5 to 11)."""
    p = {name: tensor.detach().to("cpu", torch.float64) for name, tensor in sae.parameters.items()}
    folded = {
        "w_enc": p["w_enc"],
        "w_dec": p["w_dec"],
        "b_enc": scale * (p["b_enc"] - p["b_dec"] @ p["w_enc"]),
        "b_dec": scale * p["b_dec"],
        "threshold": scale * p["threshold"],
    }
    return Sae(**{name: tensor.float() for name, tensor in folded.items()})
