"""everyscope's own trainer: a training group of one SAE."""

from torch import Tensor

from everyscope.activations.shards.norms import MAX_NORM
from everyscope.activations.stream.local import ArraySource
from everyscope.sae.config import TARGET_WEIGHT, SaeConfig, SaePreset
from everyscope.sae.functional import pre_activations
from everyscope.sae.presets import fast
from everyscope.sae.trainable import fold
from everyscope.train.training_group import TrainingGroup, normalisation_for
from peers.worker import Rows, Settings, serve, threshold_for


def config_of(settings: Settings, d_in: int) -> SaeConfig:
    """The SAE to train, by the recipe `fast`; knobs are `target_l0`, `target_weight` and the fields of SaePreset."""
    knobs = dict(settings.knobs)
    target = {"target_l0": knobs.pop("target_l0", settings.l0), "target_weight": knobs.pop("target_weight", TARGET_WEIGHT)}
    preset = SaePreset.model_validate(fast(d_in).model_dump() | knobs)
    return SaeConfig(width=settings.width, seed=settings.seed, preset=preset, **target)  # pyright: ignore[reportArgumentType]


class Everyscope:
    """A training group's step, on the CPU."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE, which sees rows as `train_saes` would: without the massive ones, centred."""
        config = config_of(settings, rows.d_in)
        self.normalise = normalisation_for([config], ArraySource(rows.training()).statistics, MAX_NORM)
        self.group = TrainingGroup([config], rows.d_in, self.normalise, settings.steps)

    def step(self, rows: Tensor) -> None:
        """As `everyscope train` does it."""
        self.group.step(rows)

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By the SAE's formulas."""
        sae = fold(self.group.saes[0], self.normalise)
        f = sae.encode(rows)
        return sae.decode(f), f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """One threshold for all latents."""
        p, x = self.group.saes[0].parameters, self.normalise(rows)
        p["threshold"].fill_(threshold_for(pre_activations(x - p["b_dec"], p["W_enc"], p["b_enc"]), l0))


if __name__ == "__main__":
    serve(Everyscope, "everyscope")
