"""A language model, loaded for reading: frozen, in evaluation mode, its sites proved; or an untrained one of its shape.

A model that no device holds is spread by its device_map: block by block, over GPUs, memory and disk. Hooks see each block's
activations on the device that the block computes on. Tensor parallelism (transformers' `tp_plan`) is not supported: it splits
what enters W_O, so that a rank would see a part of attn_out and take it for the whole.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from everyscope.base.bundled import BUNDLED_MODELS, NO_CODE, model_location
from everyscope.base.errors import ConfigError, EveryscopeError, ModelError
from everyscope.base.extras import import_extra
from everyscope.sites.config import ModelConfig
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.inputs import Inputs, read_inputs
from everyscope.sites.registry import ModelAdapter, adapter_of
from everyscope.text.tokenizer import load_tokenizer

DTYPE_KEYWORD = "dtype" if tuple(map(int, version("transformers").split(".")[:2])) >= (4, 56) else "torch_dtype"
"""What transformers calls the number format: 4.51 knows the old name alone, which later versions warn of."""


def quiet_transformers() -> None:
    """Leave the terminal to our own progress: no bar for every load of a small model, no advice about its arguments."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model and where its sites are."""

    model: nn.Module
    """The Hugging Face model, with its head."""
    adapter: ModelAdapter
    name: str
    """As the config names it: bundled name, folder or hub id."""
    revision: str | None = None
    """Of the hub id; None is the newest."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for; ModelError where there is none."""
        return load_tokenizer(self.name, self.revision)

    def __repr__(self) -> str:
        parameter = next(self.model.parameters())
        sizes = f"{self.adapter.num_layers} layers, d_model={self.adapter.d_model}, {parameter.dtype} on {parameter.device}"
        return f"LanguageModel({self.name}: {type(self.model).__name__}, {sizes})"

    def __call__(self, inputs: Inputs, **more: Any) -> Any:
        """One pass over text or token ids, in all forms that `capture` takes; what the Hugging Face model returns, as `.logits`.

        Gradients are as the caller has them; `more` goes to the model.
        """
        device = next(self.model.parameters()).device
        input_ids, mask = read_inputs(self, inputs, more.pop("attention_mask", None))
        mask = None if mask is None else mask.to(device)
        return self.model(input_ids=input_ids.to(device), attention_mask=mask, **({"use_cache": False} | more))


def bare(model: nn.Module | LanguageModel) -> nn.Module:
    """The Hugging Face model itself; ConfigError for what is no model."""
    if isinstance(model, LanguageModel):
        return model.model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={str(model)[:60]!r} is a {type(model).__name__}; pass load_language_model(name), or a model")
    return model


def load_language_model(config: ModelConfig | str, **fields: Any) -> LanguageModel:
    """Load the model, freeze it and run the residual-identity gate.

    `config` may be the name alone, with other fields of a ModelConfig by keyword: load_language_model("gpt2", device="cuda").
    Attention is eager: on some versions of transformers, sdpa silently drops Gemma 2's soft-cap. ModelError, in one line,
    where the model or device is not available, the architecture is unknown, or the gate fails; MissingExtra where a device_map
    needs accelerate.
    """
    config = _resolved(config, fields)
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
    adapter = adapter_of(model)
    model.eval().requires_grad_(False)
    if not spread:
        model.to(device=device)
    elif next(model.parameters()).is_meta:
        raise ModelError(
            f"model {config.name!r} by device_map={config.device_map}: not even its embeddings fit a device of this machine; "
            "take one with more memory"
        )
    check_residual_identity(model, adapter=adapter)
    return LanguageModel(model, adapter, config.name, config.revision)


def _resolved(config: ModelConfig | str, fields: dict[str, Any]) -> ModelConfig:
    """The whole config; ConfigError in one line for a field that is none or has a wrong value."""
    try:
        return ModelConfig.model_validate(({"name": config} if isinstance(config, str) else config.model_dump()) | fields)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "model"
        raise ConfigError(f"{field}={problem['input']!r}: {problem['msg']}; see ModelConfig for the fields") from error


def spreading(config: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained for the device map, empty without one; MissingExtra where it needs accelerate."""
    if config.device_map is None:
        return {}
    import_extra("accelerate", "large", f"model.device_map={config.device_map}")
    return {"device_map": config.device_map}


def _trained(config: ModelConfig, spread: dict[str, Any]) -> nn.Module:
    """The model with the weights of its files; ModelError where some are missing."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_location(config.name),
        revision=config.revision,
        attn_implementation="eager",
        output_loading_info=True,
        use_safetensors=True,  # a pickle may run code; torch refuses most, in words of its own
        **NO_CODE,
        **{DTYPE_KEYWORD: getattr(torch, config.dtype)},
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
        model = AutoModelForCausalLM.from_config(
            described, attn_implementation="eager", **NO_CODE, **{DTYPE_KEYWORD: torch.float32}
        )
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
