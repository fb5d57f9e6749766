"""Many SAEs of one site on the same batches: one read, one copy to the device, one update each."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.config import SaeConfig
from everyscope.sae.trainable import StepLosses, TrainableSae, dense_update, new_sae

Update = Callable[[TrainableSae, Float[Tensor, "batch d_in"], int, int], StepLosses]
"""One training step of one SAE, in place: (sae, normalised batch, step, steps). Engines are such functions."""


class Bank:
    """The SAEs of one site in training."""

    def __init__(
        self,
        configs: Sequence[SaeConfig],
        d_in: int,
        scale: float,
        steps: int,
        device: str = "cpu",
        update: Update = dense_update,
    ) -> None:
        """New SAEs for activations whose root mean squared norm is `scale` (frozen for the whole run)."""
        self.saes = [new_sae(config, d_in, device) for config in configs]
        self.scale, self.steps, self.num_steps_done = scale, steps, 0
        self._device, self._update = torch.device(device), update

    def step(self, batch: Float[Tensor, "batch d_in"]) -> list[StepLosses]:
        """One update of every SAE on raw activations; the losses stay on the device."""
        x = batch.to(self._device, non_blocking=True) / self.scale
        losses = [self._update(sae, x, self.num_steps_done, self.steps) for sae in self.saes]
        self.num_steps_done += 1
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """All state but the step count, by name."""
        return {f"{number}.{name}": tensor for number, sae in enumerate(self.saes) for name, tensor in sae.tensors().items()}

    def restore(self, tensors: dict[str, Tensor], num_steps_done: int) -> None:
        """Take over the state that `tensors()` gave after `num_steps_done` steps."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.num_steps_done = num_steps_done
