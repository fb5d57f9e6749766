"""What is reported of a training step: one row of numbers for each SAE."""

from typing import Any

from everyscope.sae.config import SaeConfig
from everyscope.sae.schedules import learning_rate_share, sparsity_weight
from everyscope.sae.trainable import StepLosses
from everyscope.train.config import sae_name


def losses_row(config: SaeConfig, losses: StepLosses, step: int, steps: int, batch_rows: int) -> dict[str, Any]:
    """The losses of the step that made `step` of `steps` [steps], and the schedules in force. Waits for the device."""
    return {
        "step": step,
        "sae": sae_name(config),
        "tokens": step * batch_rows,
        "reconstruction_loss": losses.reconstruction.item(),
        "l0": losses.l0.item(),
        "sparsity_coefficient" if config.target_l0 is None else "target_weight": sparsity_weight(config, step - 1),
        "target_l0": config.target_l0,
        "learning_rate": config.preset.learning_rate * learning_rate_share(config.preset, step - 1, steps),
    }
