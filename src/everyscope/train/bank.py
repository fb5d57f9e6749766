"""Many SAEs of one site on the same batches: one read, one copy to the device, one update each."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.config import SaeConfig
from everyscope.sae.schedules import is_driven
from everyscope.sae.thresholds import drive_thresholds, warm_start
from everyscope.sae.trainable import StepLosses, new_sae
from everyscope.train.config import EngineName
from everyscope.train.engines import engine_for


class Bank:
    """The SAEs of one site in training."""

    def __init__(
        self,
        configs: Sequence[SaeConfig],
        d_in: int,
        scale: float,
        steps: int,
        device: str = "cpu",
        engine: EngineName = "auto",
    ) -> None:
        """New SAEs for activations whose root mean squared norm is `scale` (frozen for the whole run)."""
        self.saes = [new_sae(config, d_in, device) for config in configs]
        self.scale, self.steps, self.num_steps_done = scale, steps, 0
        self.device, self._engine = torch.device(device), engine_for(engine, self.saes, device)

    def step(self, batch: Float[Tensor, "batch d_in"]) -> list[StepLosses]:
        """One update of every SAE on raw activations; the losses stay on the device."""
        x = self._normalised(batch)
        if self.num_steps_done == 0:
            self._start_warm(x)
        losses = self._engine.step(x, self.num_steps_done, self.steps)
        self.num_steps_done += 1
        for sae, loss in zip(self.saes, losses, strict=True):
            sae.last_fired.masked_fill_(loss.fired > 0, self.num_steps_done)
            if is_driven(sae.config, self.num_steps_done - 1, self.steps):
                drive_thresholds(sae, loss, self.num_steps_done)
        return losses

    def _normalised(self, batch: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        if self.device.type != "cpu":
            return batch.to(self.device) / self.scale
        # By numpy: torch would wake threads that go on spinning, for some milliseconds, on cores that the step's own need.
        return torch.from_numpy(batch.numpy() / np.float32(self.scale))

    def _start_warm(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Let SAEs that ask for it take their first biases and thresholds from the first batch."""
        for sae in self.saes:
            if sae.config.recipe.warm_start:
                warm_start(sae, x)
        self._engine.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """All state but the step count, by name; the tensors themselves, not copies."""
        saes = {f"{number}.{name}": tensor for number, sae in enumerate(self.saes) for name, tensor in sae.tensors().items()}
        return saes | {f"engine.{name}": tensor for name, tensor in self._engine.tensors().items()}

    def restore(self, tensors: dict[str, Tensor], num_steps_done: int) -> None:
        """Take over the state that `tensors()` gave after `num_steps_done` steps."""
        for name, tensor in self.tensors().items():
            if name in tensors or not name.startswith("engine."):  # another engine may go on, with a state of its own
                tensor.copy_(tensors[name])
        self._engine.refresh()
        self.num_steps_done = num_steps_done
