"""A language model, loaded for reading: frozen, in evaluation mode, its sites proved; or an untrained one of its shape.

A model that no device holds is spread by its device_map: block by block, over GPUs, memory and disk. Hooks see each block's
activations on the device that the block computes on. Tensor parallelism (transformers' `tp_plan`) is not supported: it splits
what enters W_O, so that a rank would see a part of attn_out and take it for the whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from everyscope.base.bundled import BUNDLED_MODELS, NO_CODE, model_location
from everyscope.base.errors import EveryscopeError, ModelError
from everyscope.base.extras import import_extra
from everyscope.sites.config import ModelConfig
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.registry import Anatomy, anatomy_of


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model and where its sites are."""

    model: nn.Module
    """The Hugging Face model, with its head."""
    anatomy: Anatomy
    name: str
    """As the config names it: bundled name, folder or hub id."""


def load_language_model(config: ModelConfig) -> LanguageModel:
    """Load the model, freeze it and run the residual-identity gate.

    Attention is eager: on some versions of transformers, sdpa silently drops Gemma 2's soft-cap. ModelError, in one line,
    where the model or device is not to be had, the architecture is unknown, or the gate fails; MissingExtra where a device_map
    needs accelerate.
    """
    device, spread = _device(config.device), spreading(config)
    try:
        model = _untrained(config) if config.weights == "random" else _trained(config, spread)
    except EveryscopeError:
        raise
    except Exception as error:  # a damaged config.json or index makes transformers raise whatever it meets first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"model {config.name!r} cannot be loaded: {reason[:300]}; "
            f"give a bundled model ({', '.join(BUNDLED_MODELS)}), a folder with config.json and safetensors, or a hub id"
        ) from error
    anatomy = anatomy_of(model)
    model.eval().requires_grad_(False)
    if not spread:
        model.to(device=device)
    elif next(model.parameters()).is_meta:
        raise ModelError(
            f"model {config.name!r} by device_map={config.device_map}: not even its embeddings fit a device of this machine; "
            "take one with more memory"
        )
    check_residual_identity(model, anatomy=anatomy)
    return LanguageModel(model, anatomy, config.name)


def spreading(config: ModelConfig) -> dict[str, Any]:
    """What from_pretrained is told of the device map: nothing where there is none; MissingExtra where it needs accelerate."""
    if config.device_map is None:
        return {}
    import_extra("accelerate", "large", f"model.device_map={config.device_map}")
    return {"device_map": config.device_map}


def _trained(config: ModelConfig, spread: dict[str, Any]) -> nn.Module:
    """The model with the weights of its files; ModelError where some are missing."""
    # `torch_dtype`, not `dtype`: transformers 4.51 knows only the former, and 5 takes both.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_location(config.name),
        revision=config.revision,
        torch_dtype=getattr(torch, config.dtype),
        attn_implementation="eager",
        output_loading_info=True,
        use_safetensors=True,  # a pickle may run code; torch refuses most, in words of its own
        **NO_CODE,
        **spread,
    )
    model, report = loaded
    # transformers fills weights that the files lack with random numbers and only warns.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"model {config.name!r} lacks {len(missing)} of its weights, as {missing[0]}; fetch or save it again")
    return model


def _untrained(config: ModelConfig) -> nn.Module:
    """The same architecture as transformers initialises it, by the config's seed; its files of weights are not opened.

    Drawn in float32 on the CPU and rounded then, so that the weights are the same ones in every format and on every device.
    """
    described = AutoConfig.from_pretrained(model_location(config.name), revision=config.revision, **NO_CODE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.weights_seed)
        model = AutoModelForCausalLM.from_config(described, **NO_CODE, torch_dtype=torch.float32, attn_implementation="eager")
    return model.to(getattr(torch, config.dtype))


def _device(name: str) -> torch.device:
    """The torch device; ModelError where the name is none or the machine has no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ModelError(
            f"device {name!r} cannot be used ({reason}); set the model's device to cpu or to one that is here"
        ) from error
    return device
