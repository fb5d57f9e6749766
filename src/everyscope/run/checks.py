"""What this machine must have for a run, checked before its first stage: devices, models, texts, packages, paths."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from everyscope.base.errors import ConfigError, MissingExtra, TextError, first_line
from everyscope.run.config import RunConfig
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.model import shape_of
from everyscope.run.placement import Devices
from everyscope.run.stages import Stages
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents

MODEL_STAGES = ("harvest", "evaluate", "describe", "explain")
"""Stages that run the language model."""
ALL_STAGES = ("harvest", "train", "evaluate", "describe", "explain", "publish")


def found_devices(engine: EngineConfig) -> Devices | None:
    """The GPUs that training may use, as this host has them or the engine's settings say; None where neither knows."""
    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    if engine.engine == "local":
        memory = engine.device_bytes or min(sizes, default=None)
        return None if memory is None or not sizes else Devices(memory, len(sizes), len(sizes))
    memory = engine.device_bytes or min(sizes, default=None)
    return None if memory is None else Devices(memory, engine.gpus_per_host or len(sizes) or 8, engine.gpus)


def check(stages: Stages, engine: EngineConfig, names: Sequence[str] = ALL_STAGES) -> None:
    """Refuse, with the field to change, what the stages `names` would fail on later.

    ConfigError for devices and shapes, ModelError for models, TextError for texts, MissingExtra for packages. Devices of a
    cluster's hosts are not this host's to check.
    """
    config = stages.config
    is_here = engine.engine == "local"
    if "train" in names and is_here:
        check_device(config.train.device, "train.device")
        if config.train.device.startswith("cuda") and config.train.engine != "dense":
            _require("triton", "gpu", f"train.engine={config.train.engine} on train.device={config.train.device}")
    if not set(names) & set(MODEL_STAGES):
        return
    for field, model in _models(config):
        if is_here:
            check_device(model.device, f"{field}.device")
        if model.device_map is not None:
            _require("accelerate", "large", f"{field}.device_map={model.device_map}")
    for field, text in _texts(config):
        _check_text(text, field)
    for part in stages.parts:
        check_shape(part.config)


def check_device(name: str, field: str) -> None:
    """ConfigError where `name` is no torch device, one that this machine does not have, or one without float64."""
    if name.partition(":")[0] == "mps":
        raise ConfigError(f"{field}={name!r}: statistics and scores are summed in float64, which MPS does not have; set cpu")
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"{field}={name!r} cannot be used ({first_line(error)[:120]}); this machine has {', '.join(here)}"
        ) from error


def check_shape(config: RunConfig) -> None:
    """ConfigError where the recipe's sizes are not those of the model: its plan, and what it calls all layers, would be wrong."""
    found = shape_of(config.model)
    for field in ("num_layers", "d_model", "d_attention"):
        given, size = getattr(config.sizes, field), getattr(found, field)
        if given != size:
            raise ConfigError(f"shape.{field}={given}, but {config.model.name!r} has {size}; set shape.{field}={size}")
    if found.context is not None and config.text.context > found.context:
        raise ConfigError(
            f"text.context={config.text.context}, but {config.model.name!r} reads at most {found.context} tokens; "
            f"set text.context={found.context}"
        )


def _check_text(text: TextConfig, field: str) -> None:
    for path in text.paths:
        if not Path(path).exists():
            raise TextError(f"{field}.paths: no such file or folder: {path}")
    if text.source == "files":
        in_order = text.model_copy(update={"shuffle_seed": None})  # so that nothing is read beyond the first document
        if next(read_documents(in_order), None) is None:
            raise TextError(f"{field}.paths: no text in {text.origin}; expected .txt, .jsonl or .parquet files that hold some")
    if text.source == "dataset":
        _require("datasets", "data", f"{field}.dataset={text.dataset}")


def _require(package: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, extra, purpose)


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    yield "model", config.model
    for name in ("instruction_tuned", "random_weights"):
        control = getattr(config, name)
        if control is not None:
            yield f"{name}.model", control.model


def _texts(config: RunConfig) -> Iterator[tuple[str, TextConfig]]:
    yield "text", config.text
    for name in ("instruction_tuned", "random_weights"):
        control = getattr(config, name)
        if control is not None and control.text is not None:
            yield f"{name}.text", control.text
