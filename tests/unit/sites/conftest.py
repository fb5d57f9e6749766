"""Tiny random models of every family, with gains and biases scrambled: freshly initialised ones are 1 and 0 and hide errors."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BloomConfig

BOS, EOS, PAD = 2, 1, 0
VOCAB, CONTEXT, D_MODEL, LAYERS, HEADS = 64, 10, 32, 3, 4

_COMMON = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_ROTARY = _COMMON | {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_WIDE = _ROTARY | {"num_key_value_heads": 2, "head_dim": 12}
_SLIDING = _WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 12}
_GPT2 = _COMMON | {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}

CONFIGS = {
    "gemma": _WIDE,
    "gemma2": _SLIDING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _SLIDING,
    "llama": _WIDE,
    "mistral": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _WIDE,
    "phi3": _WIDE,
    "olmo2": _WIDE,
    "gpt2": _GPT2,
    "gpt_neox": _ROTARY,
}
ATTENTION_WIDTH = {family: HEADS * config.get("head_dim", D_MODEL // HEADS) for family, config in CONFIGS.items()}


@cache
def build(family: str) -> nn.Module:
    """One model of a family, built once; tests leave it as they find it."""
    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**CONFIGS[family])
    return _scrambled(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def _scrambled(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.4 if parameter.ndim == 1 else 0.0, std=0.25)
    return model.eval().requires_grad_(False)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str):
    """A model of each family in turn; the test fails that leaves a hook or a replaced forward behind."""
    model = build(family)
    yield model
    assert num_hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def gemma2():
    model = build("gemma2")
    yield model
    assert num_hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def bloom() -> nn.Module:
    torch.manual_seed(7)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=D_MODEL, n_layer=2, n_head=HEADS)
    return _scrambled(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.fixture
def input_ids() -> Tensor:
    """Two sequences: BOS first, an EOS in the middle of the first, padding at the end of the second."""
    ids = torch.randint(3, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    ids[0, 5] = EOS
    ids[1, -3:] = PAD
    return ids


@pytest.fixture
def attention_width(family: str) -> int:
    return ATTENTION_WIDTH[family]


@pytest.fixture
def run() -> Callable[[nn.Module, Tensor], Tensor]:
    """The logits [batch ctx vocab] of one plain pass."""

    def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids, use_cache=False).logits

    return logits
