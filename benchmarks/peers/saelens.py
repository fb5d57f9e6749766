"""SAELens' JumpReLU SAE, by its SAETrainer's own `step`, with its defaults and its own normalisation to mean norm sqrt(d_in)."""

# pyright: reportMissingImports=false
# The package is in an environment of its own (peers/launch.py).

from itertools import count

from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from peers.worker import Rows, Settings, serve, threshold_for

NORM_BATCHES = 32
"""Batches from which it estimates the mean norm; its default of 1,000 is for a language model's stream [batches]."""


class SaeLens:
    """The body of SAETrainer.fit, one step at a time."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE; knobs are fields of its SAE's or its trainer's config."""
        of_sae = {name: value for name, value in settings.knobs.items() if name in JumpReLUTrainingSAEConfig.__dataclass_fields__}
        of_trainer = {name: value for name, value in settings.knobs.items() if name not in of_sae}
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                d_in=rows.d_in, d_sae=settings.width, normalize_activations="expected_average_only_in", **of_sae
            )
        )
        config = SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch,
            train_batch_size_samples=settings.batch,
            logger=LoggingConfig(log_to_wandb=False),
            **{"lr_end": SAETrainerConfig.lr / 10} | of_trainer,  # has to be set, though its constant rate ignores it
        )
        batches = (rows.batch(step, settings.batch) for step in count())
        self._trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches)
        self._scaler = self._trainer.activation_scaler
        self._scaler.estimate_scaling_factor(rows.d_in, batches, NORM_BATCHES)

    def step(self, rows: Tensor) -> None:
        """A turn of its loop, without logging."""
        self._trainer.maybe_reset_sparsity()
        self._trainer.step(rows)
        self._trainer.n_training_steps += 1

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By its SAE, in its scale and back."""
        f = self._trainer.sae.encode(self._scaler.scale(rows))
        return self._scaler.unscale(self._trainer.sae.decode(f)), f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        pre = self._trainer.sae.encode_with_hidden_pre(self._scaler.scale(rows))[1]
        self._trainer.sae.threshold.fill_(threshold_for(pre, l0))


if __name__ == "__main__":
    serve(SaeLens, "sae-lens")
