"""The language model as a harvest sees it: a fingerprint, widths of sites, and a function from token ids to activations.

Widths come from a model without weights, so that the disk is measured and a wrong site refused before anything is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.base.bundled import BUNDLED_MODELS, NO_CODE, model_location
from everyscope.base.errors import ConfigError, ModelError
from everyscope.base.fingerprint import fingerprint
from everyscope.base.hub import hub_commit
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of
from everyscope.text.tokenizer import load_tokenizer

Capture = Callable[[tuple[Site, ...], Int[Tensor, "batch ctx"]], dict[Site, Tensor]]
"""Sites and token ids to the activations at each site, [batch ctx d_in]."""
FINGERPRINTED = (".safetensors", ".bin", ".json", ".model")
"""Endings of the files that determine a model."""


@dataclass(frozen=True)
class ModelHandle:
    """What a harvest needs of a language model and its tokenizer."""

    widths: dict[Site, int]
    """Size of the activations at each wanted site [d_in]."""
    tokenizer: Any
    """A Hugging Face tokenizer."""
    open: Callable[[], Capture]
    """Loads the model; called once, after everything else has been checked."""


def model_identity(config: ModelConfig) -> str:
    """A fingerprint of a model in a local folder (the ends of its files), or the name and commit of one on the hub.

    ModelError where neither the hub nor its cache knows the model.
    """
    folder = Path(model_location(config.name))
    if not folder.is_dir():
        commit = hub_commit(config.name, config.revision, "model")
        if commit is None:
            raise ModelError(
                f"no model {config.name!r}: no such folder, and neither the hub nor its cache has it; "
                "give a bundled model, a local folder or a hub id, and see that the hub can be reached"
            )
        return f"{config.name}@{commit}"
    # Bundled models come with the package; their identities are from before chat templates were read.
    endings = FINGERPRINTED if config.name in BUNDLED_MODELS else (*FINGERPRINTED, ".jinja")
    return fingerprint(path for path in folder.iterdir() if path.suffix in endings)


def open_handle(config: HarvestConfig) -> ModelHandle:
    """The configured model, not loaded yet.

    ModelError where there is no such model or tokenizer, ConfigError where it has no such site or the context is too long.
    """
    tokenizer = load_tokenizer(config.model.name, config.model.revision)

    def open_model() -> Capture:
        model = load_language_model(config.model).model
        return lambda sites, input_ids: capture(model, sites, input_ids)

    return ModelHandle(_widths(config), tokenizer, open_model)


def _widths(config: HarvestConfig) -> dict[Site, int]:
    name = config.model.name
    try:
        described = AutoConfig.from_pretrained(model_location(name), revision=config.model.revision, **NO_CODE)
        with torch.device("meta"):
            adapter = adapter_of(AutoModelForCausalLM.from_config(described, **NO_CODE))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no model {name!r}: {reason}; give a bundled model, a local folder or a hub id") from error
    longest = getattr(adapter.config, "max_position_embeddings", None)
    if longest is not None and config.text.context > longest:
        raise ConfigError(
            f"text.context={config.text.context}, but {name!r} reads at most {longest} tokens; set text.context={longest}"
        )
    return {site: adapter.width(site) for site in config.sites}
