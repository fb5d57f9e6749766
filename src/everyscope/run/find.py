"""Finding a recipe: a name of ours, or a .py file that defines `recipe()`."""

import difflib
import importlib
import importlib.util
from pathlib import Path

from pydantic import ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import one_line
from everyscope.run.config import RunConfig

RECIPES = {
    "tiny": "everyscope.run.recipes.tiny:recipe",
    "pythia_70m": "everyscope.run.recipes.small_models:pythia_70m",
    "gpt2_small": "everyscope.run.recipes.small_models:gpt2_small",
    "smollm2_135m": "everyscope.run.recipes.small_models:smollm2_135m",
    "gemma_3_270m": "everyscope.run.recipes.small_models:gemma_3_270m",
    "gemma_2_2b": "everyscope.run.recipes.gemma_2:gemma_2_2b",
    "gemma_2_2b_transcoders": "everyscope.run.recipes.gemma_2:gemma_2_2b_transcoders",
    "gemma_2_9b": "everyscope.run.recipes.gemma_2:gemma_2_9b",
    "gemma_2_27b": "everyscope.run.recipes.gemma_2:gemma_2_27b",
    "gemma_2_9b_it": "everyscope.run.recipes.gemma_2:gemma_2_9b_it",
}
"""The recipes that come with everyscope: name, module, function."""


def find_recipe(name_or_path: str) -> RunConfig:
    """The run config of a named recipe, or of `recipe()` in a .py file; ConfigError for anything else."""
    if name_or_path in RECIPES:
        module, _, function = RECIPES[name_or_path].partition(":")
        return getattr(importlib.import_module(module), function)()
    path = Path(name_or_path)
    if path.suffix == ".py":
        return _recipe_in(path)
    if path.is_dir():
        raise ConfigError(f"{path}: has no config.json, so it is no language model; give the folder that save_pretrained wrote")
    if is_path(name_or_path):
        raise ConfigError(f"{name_or_path}: no such folder; give a language model's folder, its id on the hub, or a recipe")
    near = nearest_recipe(name_or_path)
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"unknown recipe {name_or_path!r}; {hint}Known are {', '.join(RECIPES)}, or give a path to a .py file")


def is_path(name: str) -> bool:
    """Whether a name can only mean a place on this machine, as ./model or /data/model."""
    return name.startswith((".", "/", "~"))


def nearest_recipe(name: str) -> str | None:
    """The recipe whose name a misspelt one may mean."""
    return next(iter(difflib.get_close_matches(name, RECIPES, n=1)), None)


def _recipe_in(path: Path) -> RunConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a recipe's name ({', '.join(RECIPES)}) or the path of a .py file")
    spec = importlib.util.spec_from_file_location("recipe_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.recipe()
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    except Exception as error:
        raise ConfigError(
            f"{path}: {type(error).__name__}: {error}; it must define recipe(), which returns a RunConfig"
        ) from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: recipe() returned {type(config).__name__}, expected a RunConfig")
    return config
