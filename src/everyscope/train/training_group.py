"""Many SAEs of one site, or transcoders of two, on the same batches: one read, one copy to the device, one update each.

Of several ranks each has a training group with its own latents of every SAE, and steps it on its own rows of every batch.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.statistics import Statistics
from everyscope.base.errors import ConfigError, DataError
from everyscope.sae.config import SaeConfig
from everyscope.sae.folded import Sae
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.normalisation import Normalisation, mean_on, normalised_pair
from everyscope.sae.schedules import is_driven
from everyscope.sae.thresholds import drive_thresholds, warm_start
from everyscope.sae.trainable import LATENT_AXIS, StepLosses, fold, new_sae
from everyscope.train.config import EngineName, Products, check_configs
from everyscope.train.engines import Replayable, engine_for
from everyscope.train.replay import CudaGraphs, Replay


def normalisation_for(configs: Sequence[SaeConfig], statistics: Statistics, max_norm: float | None) -> Normalisation:
    """How SAEs of one training group see activations of these statistics; rows above `max_norm` median norms are left out.

    ConfigError where some SAEs are to see other rows than others, DataError where there is nothing to reconstruct.
    """
    for field in ("is_centred", "largest_row"):
        if len({getattr(config.preset, field) for config in configs}) > 1:
            raise ConfigError(f"{field} differs between SAEs that train on the same batches; train them apart, or set one value")
    usual, preset = statistics.usual(max_norm), configs[0].preset
    is_centred = preset.is_centred
    scale = usual.spread if is_centred else usual.scale
    if not scale > 1e-6 * usual.scale:  # zero, or what rounding leaves of the difference
        what = "equal" if usual.scale else "zero"
        raise DataError(f"all {usual.count} rows are {what}, expected activations that vary; is this the right site?")
    return Normalisation(scale, usual.mean if is_centred else None, usual.norm_limit, preset.largest_row or math.inf)


@dataclass(frozen=True)
class TargetSide:
    """What transcoders are to predict."""

    d_out: int
    normalisation: Normalisation


class TrainingGroup:
    """The SAEs of one site, or the transcoders from one to another, in training."""

    def __init__(
        self,
        configs: Sequence[SaeConfig],
        d_in: int,
        normalisation: Normalisation,
        steps: int,
        device: str = "cpu",
        engine: EngineName = "auto",
        collective: Collective = ALONE,
        target: TargetSide | None = None,
        products: Products = "float32",
    ) -> None:
        """New SAEs for activations that `normalisation` brings to unit mean squared norm; transcoders where there is a `target`.

        ConfigError for transcoders whose recipe cannot be theirs, and for SAEs with a skip.
        """
        check_configs(configs, target is not None)
        self.collective, self.target = collective, target
        d_out = None if target is None else target.d_out
        self.saes = [new_sae(config, d_in, device, collective.mesh.latents(config.width), d_out) for config in configs]
        self.normalisation, self.steps, self.num_steps_done = normalisation, steps, 0
        self.products: Products = products
        self.device, self._engine = torch.device(device), engine_for(engine, self.saes, device, collective, self.products)
        self._replayable = self._engine if isinstance(self._engine, Replayable) else None
        is_recorded = self.device.type == "cuda" and collective.mesh.ranks == 1
        self._replay = Replay(CudaGraphs() if is_recorded else None)
        self._means = mean_on(normalisation, self.device), mean_on(self.target_normalisation, self.device)

    def step(self, batch: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None) -> list[StepLosses]:
        """One update of every SAE on raw activations, this rank's rows; the losses, of all ranks, stay on the device.

        Of transcoders, `target` has the raw rows to predict. On a GPU `fired` is good until the next step.
        """
        if self._replayable is not None:
            return self._step_on_gpu(self._sides(batch, target), self._replayable)
        x, y = self._normalised(batch, target)
        if self.num_steps_done == 0:
            self._start_warm(x, y)
        losses = self._engine.step(x, self.num_steps_done, self.steps, y)
        self.num_steps_done += 1
        for sae, loss in zip(self.saes, losses, strict=True):
            sae.last_fired.masked_fill_(loss.fired > 0, self.num_steps_done)
            if is_driven(sae.config, self.num_steps_done - 1, self.steps):
                drive_thresholds(sae, loss, self.num_steps_done, self.collective)
        return losses

    @torch.no_grad()
    def _step_on_gpu(self, sides: tuple[Tensor, ...], engine: Replayable) -> list[StepLosses]:
        """`step`, from a recording where there is one; nothing that is recorded depends on a number of the host."""
        step = self.num_steps_done
        with torch.cuda.device_of(sides[0]):  # Triton launches on the current device
            if step == 0:
                self._start_warm(*self._normalised_on_device(*sides))
            ways = engine.prepare(len(sides[0]), step, self.steps)
            driven = tuple(is_driven(sae.config, step, self.steps) for sae in self.saes)
            numbers, losses = self._replay.run((ways, driven), partial(self._on_device, engine, ways, driven), *sides)
            engine.settle(step)
        self.num_steps_done += 1
        copies = [list(of_sae) for of_sae in numbers.clone()]
        return [StepLosses(one[0], one[1], one[2], loss.fired) for one, loss in zip(copies, losses, strict=True)]

    def _on_device(
        self, engine: Replayable, ways: tuple[bool, ...], driven: tuple[bool, ...], *sides: Float[Tensor, "batch _"]
    ) -> tuple[Float[Tensor, "saes 3"], list[StepLosses]]:
        """The device's part of a step: of each SAE the reconstruction's error, L0 and pairs, and its losses."""
        x, y = self._normalised_on_device(*sides)
        losses = engine.launch(x, ways, y)
        done = engine.steps_done()
        for sae, loss, moves in zip(self.saes, losses, driven, strict=True):
            sae.last_fired.copy_(torch.where(loss.fired > 0, done, sae.last_fired))
            if moves:
                drive_thresholds(sae, loss, done, self.collective)
        return torch.stack([torch.stack((loss.reconstruction, loss.l0, loss.pairs)) for loss in losses]), losses

    def _normalised(self, batch: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the engine takes."""
        sides = self._sides(batch, target)
        if self.target is None:
            return self.normalisation(sides[0].float()), None
        return normalised_pair(self.normalisation, self.target.normalisation, sides[0], sides[1])

    def _sides(self, batch: Tensor, target: Tensor | None) -> tuple[Tensor, ...]:
        """The rows of each side, on the device."""
        if self.target is None:
            return (batch.to(self.device),)
        assert target is not None, "transcoders are stepped on rows of both sides"
        return batch.to(self.device), target.to(self.device)

    def _normalised_on_device(self, batch: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the engine takes, by what lies on the device already."""
        if self.target is None or target is None:
            return self.normalisation.on_device(batch.float(), self._means[0]), None
        return normalised_pair(self.normalisation, self.target.normalisation, batch.float(), target.float(), self._means)

    def folded(self) -> list[Sae]:
        """The SAEs or transcoders on raw activations, as they are now."""
        return [fold(sae, self.normalisation, self.target_normalisation) for sae in self.saes]

    @property
    def target_normalisation(self) -> Normalisation | None:
        """How transcoders see their target; None of SAEs."""
        return None if self.target is None else self.target.normalisation

    def _start_warm(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None) -> None:
        """Let SAEs that ask for it take their first biases and thresholds from the first batch."""
        for sae in self.saes:
            if sae.config.preset.warm_start:
                warm_start(sae, x, self.collective, target)
        self._engine.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """All state but the step count, by name; the tensors themselves, not copies."""
        saes = {f"{number}.{name}": tensor for number, sae in enumerate(self.saes) for name, tensor in sae.tensors().items()}
        return saes | {f"engine.{name}": tensor for name, tensor in self._engine.tensors().items()}

    def latents_of(self, name: str) -> tuple[int | None, range]:
        """Of a tensor of `tensors()`: the axis along which it is cut where latents are, and which of them are here."""
        number, _, rest = name.partition(".")
        if number == "engine":
            return None, range(0)
        sae = self.saes[int(number)]
        return LATENT_AXIS[rest.rpartition(".")[2]], range(sae.first, sae.first + sae.width)

    def restore(self, names: Collection[str], read: Callable[[str, int | None, range], Tensor], num_steps_done: int) -> None:
        """Take over the state that `tensors()` gave after `num_steps_done` steps, on however many ranks.

        `read` gives one of the tensors of `names`, of which it takes the given range along the given axis.
        """
        for name, tensor in self.tensors().items():
            if name in names or not name.startswith("engine."):  # another engine may resume, with a state of its own
                tensor.copy_(read(name, *self.latents_of(name)))
        self._engine.refresh()
        self.num_steps_done = num_steps_done
