"""everyscope's own trainer: a bank of one SAE."""

from torch import Tensor

from everyscope.sae.config import SaeConfig, SaeRecipe
from everyscope.sae.functional import decode, pre_activations
from everyscope.train.bank import Bank
from peers.worker import Rows, Settings, serve, threshold_for

RECIPE = {
    "learning_rate": 3e-3,
    "learning_rate_warmup_steps": 20,
    "learning_rate_decay": 0.3,
    "bandwidth": 0.05,
    "encoder_scale": 0.5,
}
"""For runs of some hundred steps, as in the recipe `tiny`."""


def config_of(settings: Settings, d_in: int) -> SaeConfig:
    """The SAE to train; every knob but `coefficient` is a field of SaeRecipe."""
    knobs = dict(settings.knobs)
    coefficient = knobs.pop("coefficient", 1e-3)
    # Of first pre-activations about as many pass as with the 0.1 of `tiny` at its d_in of 128: they are of size 1 / sqrt(d_in).
    start = {"initial_threshold": 0.1 * (128 / d_in) ** 0.5, "sparsity_warmup_steps": settings.steps // 4}
    recipe = SaeRecipe(**start | RECIPE | knobs)
    return SaeConfig(width=settings.width, sparsity_coefficient=coefficient, seed=settings.seed, recipe=recipe)


class Everyscope:
    """Bank.step, on the CPU."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE. The rows come scaled, so the bank's own scale is 1."""
        self.bank = Bank([config_of(settings, rows.d_in)], rows.d_in, 1.0, settings.steps)

    def step(self, rows: Tensor) -> None:
        """As `everyscope train` does it."""
        self.bank.step(rows)

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By the SAE's formulas."""
        sae = self.bank.saes[0]
        f = sae.encode(rows)
        return decode(f, sae.parameters["w_dec"], sae.parameters["b_dec"]), f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        p = self.bank.saes[0].parameters
        p["threshold"].fill_(threshold_for(pre_activations(rows - p["b_dec"], p["w_enc"], p["b_enc"]), l0))


if __name__ == "__main__":
    serve(Everyscope, "everyscope")
