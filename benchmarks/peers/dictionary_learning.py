"""dictionary_learning's JumpReluTrainer, by its own `update`. It is steered by its target L0; it has no sparsity coefficient.

Rows above ten times a batch's median norm are left out, as its activation buffer does with max_activation_norm_multiple=10, the
value that it recommends; what is left is brought to unit mean squared norm, as its `trainSAE` does.
"""

# pyright: reportMissingImports=false
# The package is in an environment of its own (peers/launch.py).

from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from torch import Tensor

from peers.worker import Rows, Settings, serve, threshold_for

NORM_MULTIPLE = 10.0
"""Its max_activation_norm_multiple [1]."""


def is_usual(rows: Tensor) -> Tensor:
    """Which rows its buffer would keep."""
    norms = rows.norm(dim=1)
    return norms <= NORM_MULTIPLE * norms.median()


class DictionaryLearning:
    """JumpReluTrainer with its defaults; its warm-ups are cut to a tenth and a fifth of a short run."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE; knobs are lr, bandwidth and sparsity_penalty."""
        sample = rows.training()[:65536]
        self._scale = sample[is_usual(sample)].square().sum(1).mean().sqrt()
        self._trainer = JumpReluTrainer(
            steps=settings.steps,
            activation_dim=rows.d_in,
            dict_size=settings.width,
            layer=0,
            lm_name="array",
            seed=settings.seed,
            target_l0=settings.l0,
            warmup_steps=min(1000, settings.steps // 10),
            sparsity_warmup_steps=min(2000, settings.steps // 5),
            **settings.knobs,
        )
        self._done = 0

    def step(self, rows: Tensor) -> None:
        """Its `update` as it stands."""
        self._trainer.update(self._done, rows[is_usual(rows)] / self._scale)
        self._done += 1

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By its SAE's forward pass."""
        x_hat, f = self._trainer.ae(rows / self._scale, output_features=True)
        return x_hat * self._scale, f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        pre = self._trainer.ae.encode(rows / self._scale, output_pre_jump=True)[1]
        self._trainer.ae.threshold.fill_(threshold_for(pre, l0))


if __name__ == "__main__":
    serve(DictionaryLearning, "dictionary-learning")
