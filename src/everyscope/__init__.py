"""everyscope: sparse autoencoders on every layer and sub-layer of any Hugging Face language model.

The public names are listed here, once, and imported when first used, so that `import everyscope` is quick.
"""

import importlib
from typing import Any

_HOMES = {
    "ArraySource": "everyscope.stream.local",
    "EveryscopeError": "everyscope.base.errors",
    "FlightSource": "everyscope.stream.flight",
    "LocalSource": "everyscope.stream.local",
    "ModelConfig": "everyscope.sites.config",
    "RunConfig": "everyscope.run.config",
    "Sae": "everyscope.sae.folded",
    "SaeConfig": "everyscope.sae.config",
    "SaeRecipe": "everyscope.sae.config",
    "Site": "everyscope.sites.names",
    "Suite": "everyscope.suite.reader",
    "capture": "everyscope.sites.capture",
    "find_recipe": "everyscope.run.find",
    "load_language_model": "everyscope.sites.model",
    "load_sae": "everyscope.suite.reader",
    "load_suite": "everyscope.suite.reader",
    "open_shards": "everyscope.shards.reader",
    "run_recipe": "everyscope.run.pipeline",
    "splice": "everyscope.sites.splice",
    "train_saes": "everyscope.train.arrays",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its home; AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module 'everyscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
