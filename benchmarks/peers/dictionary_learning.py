"""dictionary_learning's JumpReluTrainer, by its own `update`. It is steered by its target L0; it has no sparsity coefficient."""

from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from torch import Tensor

from peers.worker import Rows, Settings, serve, threshold_for


class DictionaryLearning:
    """JumpReluTrainer with its defaults; its warm-ups are cut to a tenth and a fifth of a short run."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE; knobs are lr, bandwidth and sparsity_penalty. Rows have the norm to which its `trainSAE` brings them."""
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
        self._trainer.update(self._done, rows)
        self._done += 1

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By its SAE's forward pass."""
        return self._trainer.ae(rows, output_features=True)

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        pre = self._trainer.ae.encode(rows, output_pre_jump=True)[1]
        self._trainer.ae.threshold.fill_(threshold_for(pre, l0))


if __name__ == "__main__":
    serve(DictionaryLearning, "dictionary-learning")
