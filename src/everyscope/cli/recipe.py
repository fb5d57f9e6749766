"""From the first argument to a run's config: a recipe by name or file, or a language model, for which defaults are chosen.

A run of a model keeps what was chosen in its folder: the same command resumes it, whatever this machine's rates are then.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from everyscope.base.bundled import BUNDLED_MODELS
from everyscope.base.errors import ConfigError
from everyscope.base.files import read_json
from everyscope.cli.flags import parse_fields, split_flags
from everyscope.run.automatic import Machine, UserChoices, automatic, context_of, slug, text_of
from everyscope.run.config import RunConfig
from everyscope.run.cost.prices import SUSTAINED, Rates, stage_prices
from everyscope.run.find import RECIPES, find_recipe, is_path, nearest_recipe
from everyscope.run.settings import ModelShape
from everyscope.run.stages import RECIPE_FILE, stages_of
from everyscope.sites.config import ModelConfig
from everyscope.train.config import TrainSettings

CHOICES = ("sites", "layers", "widths", "l0", "tokens", "passes", "text", "hours")
"""Flags that are for a model, not for a recipe, which says all of it."""


GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these exists where torch may find a GPU: of NVIDIA's driver, AMD's, and of Windows' below Linux."""


def is_model(name: str) -> bool:
    """Whether a first argument means a language model: a folder that holds one, a bundled one, or a hub id."""
    if name in RECIPES or name.endswith(".py"):
        return False
    if name in BUNDLED_MODELS or (Path(name) / "config.json").is_file():
        return True
    return not (Path(name).exists() or is_path(name) or nearest_recipe(name))


def resolve(options: argparse.Namespace, fields: list[str]) -> tuple[RunConfig, Path]:
    """The run's config with the fields that flags override, and its folder."""
    first = options.recipe
    default = config_of_model(options) if is_model(first) else find_recipe(first)
    out = options.out or Path("runs") / default.name
    default = placed_on(default, getattr(options, "device", None) or device_of(default, out))
    if not is_model(first) and hasattr(options, "hours"):
        given = next((name for name in CHOICES if getattr(options, name) is not None), None)
        if given is not None:
            raise ConfigError(
                f"--{given} is for a MODEL, and {first} is a recipe; its fields are flags too: "
                f"`everyscope {options.command} {first} --help-all` lists them"
            )
    prog = f"everyscope {options.command} {first}"
    of_shape, fields = split_flags(fields, {"shape"})  # by itself: tyro has no flags for the fields of what may be None
    if of_shape and default.shape is not None:
        words = [re.sub(r"^--shape\.", "--", word) for word in of_shape]
        default = default.model_copy(update={"shape": parse_fields(ModelShape, prog, words, default=default.shape)})
    others = options.flags if is_model(first) else options.flags - {f"--{name}" for name in CHOICES}
    config = parse_fields(RunConfig, prog, fields, f"Fields of the recipe {default.name!r}.", default, others)
    if config.shape is None:
        from everyscope.run.model import with_shape

        config = with_shape(config)
    return config, options.out or Path("runs") / config.name


def device_of(config: RunConfig, out: Path) -> str | None:
    """The device of a run that no flag names: that of the run in `out`, or the recipe's, or, where it says none, CUDA or the CPU.

    None leaves the recipe as it is.
    """
    if (out / RECIPE_FILE).is_file():
        return RunConfig.model_validate_json(json.dumps(read_json(out / RECIPE_FILE))).model.device
    if {"device"} & (config.model.model_fields_set | config.train.model_fields_set):
        return None
    if not any(Path(name).exists() for name in GPU_DRIVERS):
        return None  # known without torch, which takes seconds to load
    from everyscope.run.checks import found_devices
    from everyscope.run.jobs.config import EngineConfig

    return None if found_devices(EngineConfig()) is None else "cuda"


def placed_on(config: RunConfig, device: str | None) -> RunConfig:
    """The run with its models and its training on `device`."""
    if device is None:
        return config
    changes: dict[str, Any] = {
        name: control.model_copy(update={"model": control.model.model_copy(update={"device": device})})
        for name in ("instruction_tuned", "random_weights")
        if (control := getattr(config, name)) is not None
    }
    changes["model"] = config.model.model_copy(update={"device": device})
    changes["train"] = TrainSettings.model_validate(config.train.model_dump() | {"device": device})
    return config.model_copy(update=changes)


def config_of_model(options: argparse.Namespace) -> RunConfig:
    """The run that was begun in the model's folder, or a new one."""
    kept = (options.out or Path("runs") / slug(options.recipe)) / RECIPE_FILE
    if kept.is_file():
        config = RunConfig.model_validate_json(json.dumps(read_json(kept)))
        if config.model.name != options.recipe:
            raise ConfigError(f"{kept.parent}: holds a run of {config.model.name}; choose another --out")
        for name, (given, began) in asked_again(options, config).items():
            if given != began:
                raise ConfigError(f"--{name} {given}: the run in {kept.parent} began with {began}; choose another --out")
        return config
    if not hasattr(options, "hours"):
        return find_recipe(options.recipe)  # which says that there is none: only run, plan and init choose defaults
    return new_config(options.recipe, choices_of(options))


def asked_again(options: argparse.Namespace, config: RunConfig) -> dict[str, tuple[object, object]]:
    """What the command line says of a run that has begun, by flag, each beside what the run began with, as text."""
    choices, group, text = choices_of(options), config.groups[0], config.text
    corpus = text if options.text is None else text_of(options.text, text.context)
    pairs = {
        "sites": (choices.sites, group.sites),
        "layers": (choices.layers, group.layers),
        "widths": (choices.widths, group.widths),
        "l0": (choices.l0s, group.target_l0s),
        "tokens": (choices.tokens, config.harvest.num_tokens),
        "passes": (choices.passes, group.num_tokens // (config.harvest.num_tokens or group.num_tokens)),
        "text": tuple(one.origin for one in (corpus, text)),
        "hours": (choices.hours, config.sized_for_hours),
    }
    return {name: pair for name, pair in pairs.items() if getattr(options, name, None) is not None}


def choices_of(options: argparse.Namespace) -> UserChoices:
    """What the command line says of a run of a model."""
    given = {name: getattr(options, name) for name in ("sites", "layers", "widths", "tokens", "passes", "text", "hours")}
    given["l0s"] = options.l0
    found: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return UserChoices(**found)


def new_config(model: str, choices: UserChoices) -> RunConfig:
    """A run of a model, with defaults that fit it, this machine and the hours. Raises what `shape_of` and `automatic` do."""
    from everyscope.run.checks import found_devices
    from everyscope.run.model import measure_products, shape_of

    shape = shape_of(ModelConfig(name=model))
    from everyscope.run.jobs.config import EngineConfig

    devices = found_devices(EngineConfig())
    device = "cpu" if devices is None else "cuda"
    products = measure_products(device)
    machine = Machine(device, max(products, key=lambda dtype: products[dtype]))
    rates = rates_of(products, machine.dtype)

    def seconds_of(config: RunConfig) -> dict[str, float]:
        return {stage.name: stage.seconds for stage in stage_prices(stages_of(config, Path(), devices), rates)}

    return automatic(model, shape, machine, choices, text_of(choices.text, context_of(shape, machine)), seconds_of)


def rates_of(products: dict[str, float], dtype: str) -> Rates:
    """What is sustained of the products' rates, for a model in `dtype`."""
    origin = f"half of a {dtype} product's {products[dtype] / 1e12:,.2f} TFLOP/s, measured here"
    return Rates(SUSTAINED * products[dtype], SUSTAINED * products["float32"], origin)


def rates_for(config: RunConfig, teraflops: float | None) -> Rates:
    """The rates that a plan assumes: those given, or this machine's."""
    if teraflops is not None:
        return Rates(teraflops * 1e12, teraflops * 1e12, "given")
    from everyscope.run.checks import found_devices
    from everyscope.run.jobs.config import EngineConfig
    from everyscope.run.model import measure_products

    is_gpu = config.model.device.startswith("cuda") and found_devices(EngineConfig()) is not None
    return rates_of(measure_products("cuda" if is_gpu else "cpu"), config.model.dtype)
