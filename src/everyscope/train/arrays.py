"""Training SAEs and transcoders on activations that are already in memory: nothing is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from everyscope.activations.shards.norms import MAX_NORM
from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.local import ArraySource
from everyscope.activations.stream.source import Source
from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.progress import meter
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.presets import PresetName, preset_of
from everyscope.sae.trainable import StepLosses
from everyscope.sites.names import CONVENTIONS, Site, as_site
from everyscope.train.config import EngineName, Precision, SinkName, products_of
from everyscope.train.metrics import losses_row
from everyscope.train.run import fit
from everyscope.train.sinks import Sink, opened_sinks
from everyscope.train.training_group import TargetSide, TrainingGroup, normalisation_for

Callback = Callable[[int, list[StepLosses]], None]
"""Called after every step with the number of steps done and each SAE's losses, on the device: reading one waits for it."""
END_SHARE = 0.1
"""Share of a run's steps, at its end, over which an SAE's L0 is averaged for its metadata [1]."""


@dataclass(frozen=True, eq=False, repr=False)
class LossHistory:
    """What each step of one SAE's training saw."""

    step: Int64[np.ndarray, " steps"]
    """Steps done, from 1."""
    reconstruction: Float[np.ndarray, " steps"]
    """Mean ||x - x_hat||^2 over the batch, of activations scaled to a mean squared norm of 1."""
    l0: Float[np.ndarray, " steps"]
    """Mean number of active latents per row [latents]."""

    def __repr__(self) -> str:
        return f"LossHistory({len(self.step)} steps to reconstruction={self.reconstruction[-1]:.4g}, L0={self.l0[-1]:.4g})"


class TrainedSaes(Sequence[Sae]):
    """The SAEs of one training, in the order of their configs, with the losses of every step."""

    def __init__(self, saes: Sequence[Sae], losses: Sequence[LossHistory]) -> None:
        """One history for each SAE."""
        self._saes, self.losses = list(saes), list(losses)

    @overload
    def __getitem__(self, index: int) -> Sae: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sae]: ...
    def __getitem__(self, index: int | slice) -> Sae | list[Sae]:
        return self._saes[index]

    def __len__(self) -> int:
        return len(self._saes)

    def __repr__(self) -> str:
        return f"TrainedSaes({', '.join(map(repr, self._saes))})"


def train_saes(
    activations: "np.ndarray | Tensor | Source | Sequence[Any]",
    configs: SaeConfig | Iterable[SaeConfig],
    *,
    num_tokens: float | None = None,
    num_passes: float | None = None,
    batch_rows: int = 4096,
    preset: PresetName | None = None,
    max_norm: float | None = MAX_NORM,
    seed: int = 0,
    device: str = "cpu",
    engine: EngineName = "auto",
    precision: Precision = "auto",
    callback: Callback | None = None,
    report_to: SinkName | Sequence[SinkName] = (),
    report_folder: str | Path = ".",
    log_steps: int = 100,
    site: Site | str | None = None,
    model: str | None = None,
) -> TrainedSaes:
    """Train one SAE per config on raw activations [rows, d_in], or on any Source, and return them folded, with their losses.

    All SAEs see the same batches of `batch_rows` rows: `num_tokens` rows in all, or `num_passes` times all rows; give one of the
    two. `seed` shuffles an array once. Rows whose norm is above `max_norm` times the median norm are left out; None keeps all.
    `preset`, as "fast" for 10^5 to 10^8 rows, sets the field `preset` of all configs. `callback` is called every step,
    `report_to` sends losses to "wandb" or "tensorboard" every `log_steps` steps. `precision` is that of products on CUDA,
    bfloat16 unless float32 is asked for. `site` and `model` go into the SAEs' metadata.

    ConfigError for numbers that cannot be, ShapeMismatch and NonFinite for arrays that are no activations, DataError where all
    rows are equal, MissingExtra for a sink that is not installed.
    """
    source = _source_of(activations, seed)
    chosen = _chosen(configs, preset, source.d_in)
    steps = num_steps(source.num_rows, num_tokens, num_passes, batch_rows)
    normalisation, products = normalisation_for(chosen, source.statistics, max_norm), products_of(device, engine, precision)
    group = TrainingGroup(chosen, source.d_in, normalisation, steps, device, engine, products=products)
    reporting = _Reporting(
        callback, (report_to,) if isinstance(report_to, str) else tuple(report_to), Path(report_folder), log_steps
    )
    return _fitted(group, source, chosen, batch_rows, reporting, SaeMetadata(None if site is None else as_site(site), model))


def train_transcoders(
    inputs: "np.ndarray | Tensor | Source | Sequence[Any]",
    targets: "np.ndarray | Tensor | Source | Sequence[Any]",
    configs: SaeConfig | Iterable[SaeConfig],
    *,
    num_tokens: float | None = None,
    num_passes: float | None = None,
    batch_rows: int = 4096,
    preset: PresetName | None = None,
    max_norm: float | None = MAX_NORM,
    seed: int = 0,
    device: str = "cpu",
    engine: EngineName = "auto",
    precision: Precision = "auto",
    callback: Callback | None = None,
    report_to: SinkName | Sequence[SinkName] = (),
    report_folder: str | Path = ".",
    log_steps: int = 100,
    site: Site | str | None = None,
    target: Site | str | None = None,
    model: str | None = None,
) -> TrainedSaes:
    """Train one transcoder per config that predicts raw `targets` [rows, d_out] from raw `inputs` [rows, d_in], row by row.

    Everything else is as in `train_saes`; `skip=True` in a config sets an affine map beside the latents, whose products are
    bfloat16 on a CPU too unless `precision` is float32. A row that is massive on either side
    is left out. `site` and `target` name what is read and written, as in "mlp_in.3" and "mlp_out.3".

    Raises what `train_saes` does, and ShapeMismatch where inputs and targets have other numbers of rows.
    """
    source = Aligned(_source_of(inputs, seed), _source_of(targets, seed))
    read, written = source.sources
    chosen = _chosen(configs, preset, read.d_in)
    normalisation, of_target = (normalisation_for(chosen, side.statistics, max_norm) for side in (read, written))
    steps = num_steps(source.num_rows, num_tokens, num_passes, batch_rows)
    products = products_of(device, engine, precision, has_skip=any(config.skip for config in chosen))
    side = TargetSide(written.d_in, of_target)
    group = TrainingGroup(chosen, read.d_in, normalisation, steps, device, engine, target=side, products=products)
    reporting = _Reporting(
        callback, (report_to,) if isinstance(report_to, str) else tuple(report_to), Path(report_folder), log_steps
    )
    places = [None if place is None else as_site(place) for place in (site, target)]
    convention = None if places[0] is None else CONVENTIONS.get(places[0].kind)
    known = SaeMetadata(places[0], model, target=places[1], convention=convention, kind="transcoder")
    return _fitted(group, source, chosen, batch_rows, reporting, known)


@dataclass(frozen=True)
class _Reporting:
    """Callbacks after each step."""

    callback: Callback | None
    report_to: tuple[SinkName, ...]
    folder: Path
    log_steps: int


def _fitted(
    group: TrainingGroup,
    source: Source | Aligned,
    chosen: list[SaeConfig],
    batch_rows: int,
    reporting: _Reporting,
    known: SaeMetadata,
) -> TrainedSaes:
    """Train the training group to its end, and fold it; metadata gets the last steps' L0, scale and tokens."""
    steps = group.steps
    known = replace(known, scale=group.normalisation.scale, num_tokens=steps * batch_rows)
    described = {"saes": [config.as_json() for config in chosen], "num_tokens": steps * batch_rows, "batch_rows": batch_rows}
    with (
        meter("train", steps, "steps") as progress,
        opened_sinks(reporting.report_to, "train_saes", described, reporting.folder) as sinks,
    ):
        device, log_steps = str(group.device), reporting.log_steps
        recorder = _Recorder(chosen, steps, batch_rows, device, reporting.callback, sinks, log_steps)
        fit(group, source, batch_rows, [recorder, lambda group, losses: progress.advance()])
    histories, saes = recorder.histories(), group.folded()
    for sae, history in zip(saes, histories, strict=True):
        l0 = history.l0[-max(1, round(END_SHARE * steps)) :].mean(dtype=np.float64)
        sae.metadata = replace(known, l0=float(l0))
    return TrainedSaes(saes, histories)


class _Recorder:
    """Keeps each step's losses on the device, and hands them to the callback."""

    def __init__(
        self,
        configs: Sequence[SaeConfig],
        steps: int,
        batch_rows: int,
        device: str,
        callback: Callback | None,
        sinks: Sequence[Sink],
        log_steps: int,
    ) -> None:
        self._configs, self._steps, self._batch_rows = configs, steps, batch_rows
        self._callback, self._sinks, self._log_steps = callback, sinks, log_steps
        self._seen = torch.empty(steps, len(configs), 2, device=device)

    def __call__(self, group: TrainingGroup, losses: list[StepLosses]) -> None:
        done = group.num_steps_done
        self._seen[done - 1] = torch.stack([torch.stack((loss.reconstruction, loss.l0)) for loss in losses])
        if self._callback is not None:
            self._callback(done, losses)
        if self._sinks and (done % self._log_steps == 0 or done == self._steps):
            for config, loss in zip(self._configs, losses, strict=True):
                row = losses_row(config, loss, done, self._steps, self._batch_rows)
                for sink in self._sinks:
                    sink.write(row)

    def histories(self) -> list[LossHistory]:
        seen, steps = self._seen.cpu().numpy(), np.arange(1, self._steps + 1)
        return [LossHistory(steps, seen[:, place, 0], seen[:, place, 1]) for place in range(len(self._configs))]


def _source_of(activations: Any, seed: int) -> Source:
    """Activations as a source; ConfigError for what are none."""
    if isinstance(activations, np.ndarray | Tensor):
        return ArraySource(activations, seed)
    if isinstance(activations, list | tuple):
        try:
            rows = [np.asarray(row, np.float32) for row in activations]
            return ArraySource(np.stack(rows), seed)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ShapeMismatch(
                f"activations are a {type(activations).__name__} that makes no matrix; pass rows of equal length"
            ) from error
    if isinstance(activations, Mapping):
        raise ConfigError(
            f"activations are of {len(activations)} sites; SAEs train on one: pass activations['resid_post.3'], say"
        )
    if not hasattr(activations, "batch"):
        kind = type(activations).__name__
        raise ConfigError(f"activations are a {kind}; expected an array [rows, d_in] or a source, as LocalSource(folder)")
    return activations


def _chosen(configs: SaeConfig | Iterable[SaeConfig], preset: PresetName | None, d_in: int) -> list[SaeConfig]:
    """The configs with the settings of `preset`; ConfigError where there is none, or one has a preset already."""
    several = [configs] if isinstance(configs, SaeConfig) else configs
    chosen = list(several) if isinstance(several, Iterable) else []
    if not chosen or not all(isinstance(config, SaeConfig) for config in chosen):
        raise ConfigError(f"configs={configs!r:.80}: expected SaeConfig(width=4096, target_l0=50), say, or several of them")
    if preset is None:
        return chosen
    chosen_preset = preset_of(preset, d_in)
    if any(config.preset != SaePreset() for config in chosen):
        raise ConfigError(f"preset={preset!r} with configs that have a preset of their own; leave one of the two out")
    return [SaeConfig.model_validate(config.model_dump() | {"preset": chosen_preset}) for config in chosen]


def num_steps(num_rows: int, num_tokens: float | None, num_passes: float | None, batch_rows: int) -> int:
    """Batches of `batch_rows` in `num_tokens` rows or `num_passes` times `num_rows`; ConfigError for less than one batch."""
    if (num_tokens is None) == (num_passes is None):
        given = "neither is" if num_tokens is None else "both are"
        raise ConfigError(f"num_tokens or num_passes: {given} given; give one, as in num_tokens=1e6 or num_passes=2")
    if isinstance(batch_rows, bool) or batch_rows != int(batch_rows) or batch_rows < 1:
        raise ConfigError(f"batch_rows={batch_rows}: expected a whole number of at least 1")
    if num_tokens is not None:
        name, tokens = f"num_tokens={num_tokens}", num_tokens
    else:
        name, tokens = f"num_passes={num_passes}", (num_passes or 0) * num_rows
    if not 0 < tokens < float("inf") or (num_tokens is not None and tokens != int(tokens)):
        raise ConfigError(f"{name}: expected a number above 0 (num_tokens a whole one, as in 10**6 or 1e6)")
    if num_rows < batch_rows:
        raise ConfigError(
            f"activations have {num_rows} rows, fewer than one batch of batch_rows={batch_rows}; set batch_rows lower"
        )
    if tokens < batch_rows:
        raise ConfigError(f"{name} is {int(tokens)} rows, less than one batch of batch_rows={batch_rows}; change one of them")
    return int(tokens) // int(batch_rows)
