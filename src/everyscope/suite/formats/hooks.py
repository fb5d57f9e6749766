"""Where in a model other projects' names point: hooks of TransformerLens, modules of Hugging Face, forms of an MLP's input.

Three things are called the MLP's input: the residual stream behind the norm without the norm's gain (`ln2.hook_normalized`, Gemma
Scope), with it (`mlp.hook_in`, which the MLP itself receives, Gemma Scope 2), and before the norm (`hook_resid_mid`, and
TransformerLens's own `hook_mlp_in`).
"""

import re

from everyscope.base.errors import ConfigError
from everyscope.sae.metadata import InputConvention, SaeMetadata
from everyscope.sites.names import Site, SiteKind

HookLocation = tuple[Site | None, InputConvention | None]
"""A site, None where we have none, and of the MLP's input its form."""
NOWHERE: HookLocation = (None, None)
INPUT_HOOKS: dict[InputConvention, str] = {
    "normalised": "ln2.hook_normalized",
    "mlp_input": "mlp.hook_in",
    "residual": "hook_resid_mid",
}
"""TransformerLens's names of the MLP's input within a block, by its form."""
CONVENTIONS = {hook: convention for convention, hook in INPUT_HOOKS.items()} | {"hook_mlp_in": "residual"}
OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")
"""What an MLP gives; they differ where the model normalises it before it is added."""
MODULES: dict[str, tuple[SiteKind, InputConvention | None]] = {
    "output": ("resid_post", None),
    "self_attn.o_proj.input": ("attn_out", None),
    "post_feedforward_layernorm.output": ("mlp_out", None),
    "pre_feedforward_layernorm.output": ("mlp_in", "mlp_input"),
}
"""Gemma Scope 2's names within model.layers.<L>."""


def mlp_input(layer: int, convention: InputConvention) -> HookLocation:
    """The input of the MLP of `layer`, in one of its forms."""
    return Site("resid_mid" if convention == "residual" else "mlp_in", layer), convention


def place(hook: str) -> HookLocation:
    """The place of a name of TransformerLens, as blocks.3.hook_resid_post; NOWHERE where we have no such site."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if found and found[2] in CONVENTIONS:
        return mlp_input(int(found[1]), CONVENTIONS[found[2]])  # pyright: ignore[reportArgumentType]
    if found and found[2] in OUTPUT_HOOKS:
        return Site("mlp_out", int(found[1])), None
    try:
        return Site.parse(hook), None
    except ConfigError:
        return NOWHERE


def module_place(name: str) -> HookLocation:
    """The place of a name of Gemma Scope 2, as model.layers.3.output; NOWHERE where it names several layers or no site."""
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(.+)", name)
    if not found or found[2] not in MODULES:
        return NOWHERE
    kind, convention = MODULES[found[2]]
    return Site(kind, int(found[1])), convention


def module_name(site: Site | None) -> str:
    """Gemma Scope 2's name of a site; ConfigError where it has none."""
    names = {kind: name for name, (kind, _) in MODULES.items()}
    if site is None or site.kind not in names:
        raise ConfigError(
            f"{site or 'an SAE without a site'}: Gemma Scope 2 has no name for it; its sites are {', '.join(names)}"
        )
    return f"model.layers.{site.layer}.{names[site.kind]}"


def described(
    reads: HookLocation,
    writes: HookLocation,
    *,
    model: object = None,
    l0: object = None,
    num_tokens: object = None,
    is_transcoder: bool | None = None,
) -> SaeMetadata:
    """What files say of a coder; whatever is no text or number is left out. It is a transcoder where it writes another place."""
    kind = "transcoder" if is_transcoder or (is_transcoder is None and reads[0] != writes[0]) else "sae"
    return SaeMetadata(
        site=reads[0],
        model=model if isinstance(model, str) else None,
        l0=float(l0) if isinstance(l0, int | float) else None,
        num_tokens=num_tokens if isinstance(num_tokens, int) else None,
        target=writes[0] if kind == "transcoder" else None,
        convention=reads[1] if kind == "transcoder" else None,
        kind=kind,
    )
