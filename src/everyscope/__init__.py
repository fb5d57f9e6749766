"""everyscope: sparse autoencoders on every layer and sub-layer of any Hugging Face language model.

The public names are listed here, once for running and once for type checkers, and imported when first used, so that
`import everyscope` is quick.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everyscope.activations.shards.reader import open_shards
    from everyscope.activations.stream.flight import FlightSource
    from everyscope.activations.stream.local import ArraySource, LocalSource
    from everyscope.base.errors import EveryscopeError
    from everyscope.circuits.attribution import attribute
    from everyscope.circuits.config import AttributionConfig, Contrast, Latent, TargetTokens
    from everyscope.circuits.intervene import Edit, intervene
    from everyscope.circuits.validation import validate
    from everyscope.run.config import RunConfig
    from everyscope.run.find import find_recipe
    from everyscope.run.pipeline import run_recipe
    from everyscope.sae.config import SaeConfig, SaePreset
    from everyscope.sae.folded import Sae, save_sae
    from everyscope.sae.metadata import SaeMetadata
    from everyscope.sae.presets import fast, gemma_scope, gemma_scope_2
    from everyscope.sites.capture import capture, capturing
    from everyscope.sites.config import ModelConfig
    from everyscope.sites.inputs import Tokens, tokenize
    from everyscope.sites.model import LanguageModel, load_language_model
    from everyscope.sites.names import Site
    from everyscope.sites.splice import Spliced, splice
    from everyscope.suite.reader import Suite, load_sae, load_suite
    from everyscope.train.arrays import TrainedSaes, train_saes, train_transcoders

_HOMES = {
    "ArraySource": "everyscope.activations.stream.local",
    "AttributionConfig": "everyscope.circuits.config",
    "Contrast": "everyscope.circuits.config",
    "Edit": "everyscope.circuits.intervene",
    "EveryscopeError": "everyscope.base.errors",
    "FlightSource": "everyscope.activations.stream.flight",
    "LanguageModel": "everyscope.sites.model",
    "Latent": "everyscope.circuits.config",
    "LocalSource": "everyscope.activations.stream.local",
    "ModelConfig": "everyscope.sites.config",
    "RunConfig": "everyscope.run.config",
    "Sae": "everyscope.sae.folded",
    "SaeConfig": "everyscope.sae.config",
    "SaeMetadata": "everyscope.sae.metadata",
    "SaePreset": "everyscope.sae.config",
    "Site": "everyscope.sites.names",
    "Spliced": "everyscope.sites.splice",
    "Suite": "everyscope.suite.reader",
    "TargetTokens": "everyscope.circuits.config",
    "Tokens": "everyscope.sites.inputs",
    "TrainedSaes": "everyscope.train.arrays",
    "attribute": "everyscope.circuits.attribution",
    "capture": "everyscope.sites.capture",
    "capturing": "everyscope.sites.capture",
    "fast": "everyscope.sae.presets",
    "find_recipe": "everyscope.run.find",
    "gemma_scope": "everyscope.sae.presets",
    "gemma_scope_2": "everyscope.sae.presets",
    "intervene": "everyscope.circuits.intervene",
    "load_language_model": "everyscope.sites.model",
    "load_sae": "everyscope.suite.reader",
    "load_suite": "everyscope.suite.reader",
    "open_shards": "everyscope.activations.shards.reader",
    "run_recipe": "everyscope.run.pipeline",
    "save_sae": "everyscope.sae.folded",
    "splice": "everyscope.sites.splice",
    "tokenize": "everyscope.sites.inputs",
    "train_saes": "everyscope.train.arrays",
    "train_transcoders": "everyscope.train.arrays",
    "validate": "everyscope.circuits.validation",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its home; AttributeError for any other."""
    if name not in _HOMES:
        close = difflib.get_close_matches(name, __all__, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(__all__)}"
        raise AttributeError(f"module 'everyscope' has no attribute {name!r}; {hint}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
