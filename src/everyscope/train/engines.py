"""Ways to compute a training step. All give the paper's gradients; they differ in what they do not compute."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from everyscope.base.errors import ConfigError
from everyscope.sae.across_ranks import shared_dense_update
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.pairs_cpu import CpuPairs
from everyscope.sae.trainable import StepLosses, TrainableSae, catch_up, dense_update
from everyscope.train.config import EngineName, Products


class StepEngine(Protocol):
    """Steps the SAEs of one training group, or one rank's shards of them, in place."""

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_out"] | None = None
    ) -> list[StepLosses]:
        """One training step of every SAE on normalised activations; transcoders predict `target`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beyond the SAEs."""
        ...

    def refresh(self) -> None:
        """Take notice that SAEs and tensors were changed from outside."""
        ...


@runtime_checkable
class Replayable(StepEngine, Protocol):
    """An engine whose steps are divided into what the host decides and what only the device does."""

    def prepare(self, rows: int, step: int, steps: int) -> tuple[bool, ...]:
        """Decide how this step is launched, and send its numbers to the device."""
        ...

    def launch(
        self, x: Float[Tensor, "batch d_in"], ways: tuple[bool, ...], target: Float[Tensor, "batch d_out"] | None = None
    ) -> list[StepLosses]:
        """The device's part, on normalised activations; transcoders predict `target`."""
        ...

    def settle(self, step: int) -> None:
        """Send what later steps are decided by to the host."""
        ...

    def steps_done(self) -> Tensor:
        """The steps that are done when this one is, [], int32, on the device."""
        ...


class Dense:
    """The oracle and the way on any device: five products [batch, d_in, d_sae] a step."""

    def __init__(self, saes: Sequence[TrainableSae], collective: Collective = ALONE) -> None:
        """Take over `saes`, whose tensors change in place."""
        self.saes, self.collective = saes, collective
        self.refresh()

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_out"] | None = None
    ) -> list[StepLosses]:
        """One training step of every SAE on normalised activations; transcoders predict `target`."""
        if self._may_lag:
            for sae in self.saes:
                catch_up(sae, step)
            self._may_lag = False
        if self.collective.mesh.ranks == 1:
            return [dense_update(sae, x, step, steps, target) for sae in self.saes]
        return [shared_dense_update(sae, x, step, steps, self.collective, target)[0] for sae in self.saes]

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def refresh(self) -> None:
        """SAEs that another engine trained may have means of squared gradients that lag behind."""
        self._may_lag = True


def engine_for(
    name: EngineName,
    saes: Sequence[TrainableSae],
    device: str,
    collective: Collective = ALONE,
    products: Products = "float32",
) -> StepEngine:
    """The engine of that name for SAEs on `device`; ConfigError where pairs are asked for and there are no kernels."""
    kind = device.partition(":")[0]
    has_kernels = kind in ("cpu", "cuda")
    sizes = {(len(sae.parameters["W_enc"]), len(sae.parameters["b_dec"])) for sae in saes}
    unequal = [f"d_in={d_in}, d_out={d_out}" for d_in, d_out in sizes if d_in != d_out]
    if kind == "cuda" and name != "dense" and unequal:
        raise ConfigError(
            f"{unequal[0]} with device={device}: its kernels are for transcoders between places of equal size, as mlp_in and "
            "mlp_out; choose engine=dense"
        )
    if name == "pairs" and not has_kernels:
        raise ConfigError(f"engine=pairs has kernels for cpu and cuda, not for device={device}; choose engine=auto or dense")
    if name == "dense" or not has_kernels:
        return Dense(saes, collective)
    if kind == "cpu":
        return CpuPairs(saes, collective, rounds_skips=products == "bfloat16")
    # Kernels for CUDA only here: they need Triton, which comes with CUDA builds of torch alone.
    if products == "bfloat16":
        return import_module("everyscope.sae.bf16_gpu").GpuBfloat16(saes, collective)
    return import_module("everyscope.sae.pairs_gpu").GpuPairs(saes, collective=collective)
