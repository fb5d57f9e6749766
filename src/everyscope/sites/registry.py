"""Which module of which architecture holds each site, and on which side.

Names alone mislead: `post_attention_layernorm` is what attention adds through in Gemma 2 and OLMo-2, but the MLP's
pre-norm in Llama. So each family is listed by hand, and `identity.check_residual_identity` proves the list at load.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.names import Site

Side = Literal["input", "output"]


@dataclass(frozen=True)
class ModelFamily:
    """Where one architecture keeps its parts: dotted paths, from the model to its blocks and from a block to its modules."""

    blocks: tuple[str, ...]
    """Where the list of blocks may be; the first that exists is taken."""
    attention: str
    """The whole attention module."""
    projection: str
    """W_O, whose input is the heads' concatenated outputs."""
    attention_added: str
    """Its output is what attention adds to the residual stream."""
    mlp_added: str
    """Its output is what the MLP adds to the residual stream."""
    mlp_norm: str | None
    """The norm whose output the MLP reads; None where it reads the residual stream."""
    mlp: str = "mlp"
    """The whole MLP module."""


def _pre_norm(*blocks: str) -> ModelFamily:
    """Blocks that add what attention and MLP give, as it is."""
    return ModelFamily(blocks, "self_attn", "self_attn.o_proj", "self_attn", "mlp", "post_attention_layernorm")


def _post_norm(*blocks: str, mlp_norm: str | None = "pre_feedforward_layernorm") -> ModelFamily:
    """Blocks that normalise what attention and MLP give before they add it."""
    return ModelFamily(
        blocks, "self_attn", "self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm", mlp_norm
    )


FAMILIES: dict[str, ModelFamily] = {
    "gemma": _pre_norm("model.layers"),
    "gemma2": _post_norm("model.layers"),
    "gemma3": _post_norm("model.language_model.layers", "language_model.model.layers"),
    "gemma3_text": _post_norm("model.layers"),
    "gpt2": ModelFamily(("transformer.h",), "attn", "attn.c_proj", "attn", "mlp", "ln_2"),
    "gpt_neox": ModelFamily(("gpt_neox.layers",), "attention", "attention.dense", "attention", "mlp", "post_attention_layernorm"),
    "llama": _pre_norm("model.layers"),
    "mistral": _pre_norm("model.layers"),
    "olmo2": _post_norm("model.layers", mlp_norm=None),
    "phi3": _pre_norm("model.layers"),
    "qwen2": _pre_norm("model.layers"),
    "qwen3": _pre_norm("model.layers"),
}
"""The architectures that we know, by `model_type` of their Hugging Face config."""


@dataclass(frozen=True)
class HookPoint:
    """One side of one module: its first argument, or what it returns (element 0 where that is a tuple)."""

    module: nn.Module
    side: Side


@dataclass(frozen=True, eq=False)
class ModelAdapter:
    """The blocks of one model and what to find in them."""

    family: ModelFamily
    blocks: tuple[nn.Module, ...]
    config: Any
    """The config of the language part, from which the blocks were built."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    def hook_point(self, site: Site) -> HookPoint:
        """Where `site` is read: of a transcoder's, what the MLP reads. ConfigError where the model has no such layer."""
        block = self.block(site.layer)
        match site.inputs[0].kind:
            case "embed":
                return HookPoint(block, "input")
            case "attn_out":
                return HookPoint(_part(block, self.family.projection), "input")
            case "mlp_out":
                return HookPoint(_part(block, self.family.mlp_added), "output")
            case "resid_post":
                return HookPoint(block, "output")
            case "mlp_in":
                return HookPoint(_part(block, self.family.mlp), "input")
            case _:
                return HookPoint(_part(block, self.family.mlp_norm or self.family.mlp), "input")

    def width(self, site: Site) -> int:
        """Size of the activations that a coder at `site` reads [d_in]: heads x head_dim for attn_out, else d_model."""
        if site.kind != "attn_out":
            self.block(site.layer)
            return self.d_model
        place = self.hook_point(site)
        # GPT-2's Conv1D has no in_features; it keeps its weight as [d_in, d_out].
        return getattr(place.module, "in_features", None) or place.module.get_parameter("weight").shape[0]

    def attention(self, layer: int) -> HookPoint:
        """What the attention module of `layer` gives, before any post-norm."""
        return HookPoint(_part(self.block(layer), self.family.attention), "output")

    def projected(self, layer: int) -> HookPoint:
        """What W_O of `layer` gives."""
        return HookPoint(_part(self.block(layer), self.family.projection), "output")

    def attention_added(self, layer: int) -> HookPoint:
        """What attention of `layer` adds to the residual stream [batch ctx d_model]."""
        return HookPoint(_part(self.block(layer), self.family.attention_added), "output")

    def mlp_parts(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules that make mlp_out of mlp_in, one after another: the MLP and, where there is one, its post-norm."""
        paths = dict.fromkeys((self.family.mlp, self.family.mlp_added))
        return tuple(_part(self.block(layer), path) for path in paths)

    def norm_parts(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules that make mlp_in of resid_mid: the norm, or none."""
        norm = self.mlp_norm(layer)
        return () if norm is None else (norm,)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm between the residual stream and the MLP of `layer`; None where there is none."""
        return None if self.family.mlp_norm is None else _part(self.block(layer), self.family.mlp_norm)

    def block(self, layer: int) -> nn.Module:
        """The block of `layer`; ConfigError where there is none."""
        if not 0 <= layer < self.num_layers:
            raise ConfigError(f"layer {layer} is out of range: the model has layers 0 to {self.num_layers - 1}")
        return self.blocks[layer]


def adapter_of(model: nn.Module) -> ModelAdapter:
    """The adapter of a Hugging Face causal language model, by its config's `model_type`.

    ModelError where that type is unknown (the message lists the known ones) or its blocks are not where they should be.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r} ({type(model).__name__}) is not supported; supported are {', '.join(FAMILIES)}; "
            "use one of these or register its adapter in everyscope.sites.registry.FAMILIES"
        )
    return inspect_blocks(model, FAMILIES[model_type])


def inspect_blocks(model: nn.Module, family: ModelFamily) -> ModelAdapter:
    """The adapter of `model` read as a member of `family`; ModelError where it has no blocks at the family's paths."""
    config: Any = model.config
    language_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for path in family.blocks:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        return ModelAdapter(family, tuple(blocks.children()), language_config)
    raise ModelError(
        f"{type(model).__name__} keeps no blocks at {' or '.join(family.blocks)}; "
        "load it with its language-model head (AutoModelForCausalLM), without wrappers"
    )


def _part(block: nn.Module, path: str) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(block).__name__} has no {path}; this version of transformers builds it otherwise: change sites/registry.py"
        ) from error
