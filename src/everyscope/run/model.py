"""What a run must know of a language model before it is loaded: its sizes, and in which number format this machine is fast."""

import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from everyscope.base.bundled import NO_CODE, model_location
from everyscope.base.errors import ModelError, first_line
from everyscope.run.config import RunConfig
from everyscope.run.settings import ModelShape
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of

PRODUCT_ROWS, PRODUCT_SIZE = 512, 1024
"""Of the product that is timed, [rows, size] x [size, size]: about that of a small model's batch."""
HUB_SECONDS = 5.0
"""How long the hub may take to answer [s]."""


def shape_of(model: ModelConfig) -> ModelShape:
    """The sizes of a model, from its config.json alone: it is built without weights.

    ModelError where the file cannot be found or the architecture has no known sites.
    """
    require_hub(model.name, model.revision)
    try:
        described = AutoConfig.from_pretrained(model_location(model.name), revision=model.revision, **NO_CODE)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(described, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no model {model.name!r}: {first_line(error)}; give a bundled model, a local folder or a hub id"
        ) from error
    adapter = adapter_of(built)
    in_blocks = sum(parameter.numel() for block in adapter.blocks for parameter in block.parameters())
    return ModelShape(
        num_layers=adapter.num_layers,
        d_model=adapter.width(Site("resid_post", 0)),
        d_attention=adapter.width(Site("attn_out", 0)),
        num_parameters=sum(parameter.numel() for parameter in built.parameters()),
        num_block_parameters=in_blocks,
        vocabulary=adapter.config.vocab_size,
        context=getattr(adapter.config, "max_position_embeddings", None),
    )


def with_shape(config: RunConfig) -> RunConfig:
    """The config with the sizes of its model; where it gives them itself, they stay. Raises what `shape_of` does."""
    return config if config.shape is not None else config.model_copy(update={"shape": shape_of(config.model)})


def measure_products(device: str = "cpu", seconds: float = 0.3) -> dict[str, float]:
    """Operations a second of a product in each number format that models are run in [operations/s].

    On the CPU these are seconds of its cores, not of the clock: what else the machine does meanwhile does not count.
    """
    clock, share = (time.perf_counter, 1) if device != "cpu" else (time.process_time, torch.get_num_threads())
    rates = {}
    for dtype in ("float32", "bfloat16"):
        left = torch.ones(PRODUCT_ROWS, PRODUCT_SIZE, dtype=getattr(torch, dtype), device=device)
        right = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=getattr(torch, dtype), device=device)
        (left @ right).sum().item()
        products, start = 0, clock()
        while clock() - start < seconds * share:
            (left @ right)[0, 0].item()  # waits for the device
            products += 1
        rates[dtype] = share * products * 2 * PRODUCT_ROWS * PRODUCT_SIZE**2 / (clock() - start)
    return rates


def require_hub(name: str, revision: str | None) -> None:
    """ModelError, within seconds, where `name` is neither here nor in the cache and the hub does not answer at all."""
    if Path(model_location(name)).exists() or constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
    except HFValidationError as error:
        raise ModelError(f"no model {name!r}: no such folder, and no hub id, as in owner/name") from error
    host = urlsplit(constants.ENDPOINT)
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname or "", port), timeout=HUB_SECONDS).close()
    except OSError as error:
        raise ModelError(
            f"no model {name!r}: no local folder, not in the cache, and {host.hostname} does not answer ({first_line(error)})"
        ) from error
