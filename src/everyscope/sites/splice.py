"""Forward passes with some activations replaced: by SAEs' reconstructions, by zeros, by whatever a function makes of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from everyscope.base.errors import ConfigError, ModelError, ShapeMismatch
from everyscope.sites.block_output import returns_tuple
from everyscope.sites.hooks import Visitor, visiting
from everyscope.sites.model import LanguageModel, bare
from everyscope.sites.names import BySite, Site, Value, as_site, site_of_convention
from everyscope.sites.registry import HookPoint, ModelAdapter, adapter_of

Edit = Callable[..., Float[Tensor, "batch ctx d_out"]]
"""What replaces activations: a function of them that keeps their shape. An Sae is one. At a transcoder's site it is a function of
two: what is read there in this very pass, and what is written, which it replaces. A transcoder may stand for one too."""
LatentEdit = Callable[[Float[Tensor, "batch ctx d_sae"]], Float[Tensor, "batch ctx d_sae"]]
"""What replaces an SAE's latents: a function of them that keeps their shape."""
NoLatentEdits: Mapping[Site | str, LatentEdit] = MappingProxyType({})


@runtime_checkable
class Autoencoder(Protocol):
    """An edit in two halves, whose middle can be seen and changed: an Sae, a transcoder, or another library's."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Latents of activations."""
        ...

    def decode(self, f: Tensor, /) -> Tensor:
        """The reconstruction from latents."""
        ...


@dataclass(frozen=True)
class Spliced:
    """What passes inside a splice leave behind."""

    latents: BySite[Float[Tensor, "batch ctx d_sae"]] = field(default_factory=BySite)
    """Of the last pass, at the sites of SAEs: the latents that were decoded, after `edit_latents`, of all positions. Nothing is
    detached."""


@contextmanager
def splice(
    model: nn.Module | LanguageModel,
    edits: Mapping[Any, Edit] | Edit,
    mask: Bool[Tensor, "batch ctx"] | None = None,
    *,
    keep_error: bool = False,
    edit_latents: LatentEdit | Mapping[Any, LatentEdit] = NoLatentEdits,
) -> Iterator[Spliced]:
    """Inside the block, every forward pass replaces the activations at each site by `edits[site]` of them.

    Sites may be names, as in {"resid_post.3": sae}; an Sae that knows its site may stand alone. At a transcoder's site, the MLP's
    output is replaced by the transcoder of the MLP's input in the same pass, whatever other edits have made of that.
    `edit_latents` is a function of an SAE's latents, or several by site, whose results are decoded in their place. With
    `keep_error`, what SAEs leave out is added back, x + decode(edited) - decode(encode(x)): a pass without edits then gives the
    same bits as without the splice, and gradients see the error as a constant.

    `mask` is True where to replace; other positions pass through bit for bit. Without one, BOS, EOS and padding (by the
    model's config, in the input_ids of each pass) pass through. The edit sees all positions. Everything is undone at the
    end, after errors too. ConfigError for sites that are none, a layer that the model does not have, or options that need SAEs
    where an edit is none; while a pass runs, ShapeMismatch for an edit or mask of the wrong shape or device, and ModelError
    where a mask must be made but the pass has no input_ids.
    """
    model = bare(model)
    adapter, current, spliced = adapter_of(model), _Mask(mask), Spliced()
    by_site = _edits_by_site(edits)
    latent_edits = dict.fromkeys(by_site, edit_latents) if callable(edit_latents) else _by_site(edit_latents)
    if unused := [str(site) for site in latent_edits if site not in by_site]:
        raise ConfigError(f"edit_latents names {', '.join(unused)}, where nothing is spliced; splice an SAE there too")
    for site, edit in by_site.items():
        if isinstance(edit, Autoencoder):
            by_site[site] = _through_latents(site, edit, latent_edits.get(site), keep_error, spliced)
        elif keep_error or site in latent_edits:
            option = "keep_error" if keep_error else "edit_latents"
            raise ConfigError(f"splice at {site}: {option} needs an SAE, with encode and decode; got a {type(edit).__name__}")
    visits = [visit for site, edit in by_site.items() for visit in _visits(adapter, site, edit, current)]
    with ExitStack() as stack:
        if mask is None:
            stack.enter_context(current.following(model))
        stack.enter_context(visiting(visits))
        yield spliced


def _by_site(named: Mapping[Any, Value]) -> dict[Site, Value]:
    """The same by site; ConfigError where two names are of one site."""
    found: dict[Site, Value] = {}
    for name, value in named.items():
        if as_site(name) in found:
            raise ConfigError(f"{name!r}: {as_site(name)} is named twice; give each site once")
        found[as_site(name)] = value
    return found


def _edits_by_site(edits: Mapping[Any, Edit] | Edit) -> dict[Site, Edit]:
    if isinstance(edits, Mapping):
        found = _by_site(edits)
        if wrong := [site for site, edit in found.items() if not callable(edit)]:
            raise ConfigError(
                f"splice at {wrong[0]}: {type(found[wrong[0]]).__name__} is no function of activations; give an SAE"
            )
        return found
    metadata = getattr(edits, "metadata", None)
    site = getattr(metadata, "coder_site", getattr(metadata, "site", None))
    if site is None:
        raise ConfigError(
            f"{type(edits).__name__} does not say at which site to splice; write splice(model, {{'resid_post.3': sae}})"
        )
    return {site: edits}


def _through_latents(site: Site, sae: Autoencoder, edit: LatentEdit | None, keep_error: bool, spliced: Spliced) -> Edit:
    """Encode, edit, decode. The error that is kept is a constant to gradients, which therefore go through the latents."""
    has_skip = getattr(sae, "W_skip", None) is not None  # then what is decoded depends on what was read
    convention = getattr(getattr(sae, "metadata", None), "convention", None)
    if (other := site_of_convention(site, convention)) is not None:
        raise ConfigError(
            f"splice at {site}: this transcoder reads {other.inputs[0]}, {site} reads {site.inputs[0]}; splice it at {other}"
        )
    if convention == "normalised":
        raise ConfigError(
            f"splice at {site}: this transcoder takes its input without the norm's gain, which {site.inputs[0]} has; "
            "convert it first: everyscope.sae.conventions.to_convention(transcoder, 'mlp_input', gain)"
        )

    def decoded(f: Tensor, x: Tensor) -> Tensor:
        coder: Any = sae
        return coder.decode(f, x) if has_skip else coder.decode(f)

    def replace(x: Tensor, written: Tensor | None = None) -> Tensor:
        f = sae.encode(x)
        edited = f if edit is None else edit(f)
        if edited.shape != f.shape:
            raise ShapeMismatch(
                f"splice at {site}: edit_latents returned shape {tuple(edited.shape)} for {tuple(f.shape)}; it must keep it"
            )
        spliced.latents[site] = edited
        x_hat = decoded(edited, x)
        if not keep_error:
            return x_hat
        with torch.no_grad():
            clean = x_hat.detach() if edit is None else decoded(f, x)
        return (x if written is None else written).detach() + (
            x_hat - clean
        )  # in this order: without an edit, the bracket is exactly zero

    return replace


@contextmanager
def resuming(model: nn.Module, layer: int, resid: Float[Tensor, "batch ctx d_model"]) -> Iterator[None]:
    """Inside the block, blocks 0 to `layer` compute nothing and return `resid`, the output of block `layer` in an earlier pass.

    So a pass costs only the layers above, and a splice at resid_post of `layer`, or above, meets what it would meet in a
    full pass. With layer=-1 nothing is skipped. The passes must have the input_ids that `resid` is from, and
    use_cache=False: the skipped blocks leave no keys and values. ConfigError for a layer that the model does not have,
    ShapeMismatch where `resid` fits neither model nor input.
    """
    adapter = adapter_of(model)
    if layer != -1:
        adapter.block(layer)
    if resid.shape[-1] != adapter.d_model:
        raise ShapeMismatch(f"resid has width {resid.shape[-1]}, the model {adapter.d_model}; capture resid_post of this model")

    def shortcut(block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape != resid.shape:
                raise ShapeMismatch(
                    f"resid has shape {tuple(resid.shape)}, this pass works on {tuple(hidden.shape)}; "
                    "give the input_ids that it was captured from"
                )
            moved = resid.to(hidden)
            return (moved,) if returns_tuple(block, adapter.config, args, kwargs) else moved

        return forward

    with ExitStack() as stack:
        for block in adapter.blocks[: layer + 1]:
            stack.enter_context(forward_replaced(block, shortcut(block)))
        yield


@contextmanager
def forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one instance another `forward`; hooks on it still run. Whatever stood on the instance before is put back."""
    missing = object()
    before = block.__dict__.get("forward", missing)
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


class _Mask:
    """The mask of the pass that runs: a fixed one, or one made from the input_ids of each pass."""

    def __init__(self, mask: Tensor | None) -> None:
        """`mask`: bool [batch ctx], or None where `following` will make it."""
        self.tensor = mask[None] if mask is not None and mask.ndim == 1 else mask

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Compute the mask in each forward pass of `model`: True but at BOS, EOS and padding."""
        special = special_ids(model)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input_ids = args[0] if args else kwargs.get("input_ids")
            if input_ids is None:
                raise ModelError("this pass has no input_ids to find BOS, EOS and padding in; give splice a mask [batch, ctx]")
            self.tensor = ~torch.isin(input_ids, torch.tensor(special, dtype=input_ids.dtype, device=input_ids.device))

        def forget(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.tensor = None

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(see, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(forget, always_call=True).remove)
            yield


def special_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids of BOS, EOS and padding by the model's config, ascending; each may be absent, one id or a list of them.

    Where a chat model's turns are marked by the same ids, as in SmolLM2-Instruct, these markers are among them: a mask of
    `text.blocks`, which goes by where packing put a token, keeps them apart.
    """
    config: Any = model.config
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    ids: set[int] = set()
    for source in configs:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            ids.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return tuple(sorted(ids))


def _visits(adapter: ModelAdapter, site: Site, edit: Edit, current: _Mask) -> list[tuple[HookPoint, Visitor]]:
    """The visits of one edit: one, or where the site reads one place and writes another, one of each."""
    reads, writes = site.inputs[0], site.outputs[0]
    if reads == writes:
        return [(adapter.hook_point(site), _replace(site, edit, current))]
    read: list[Tensor] = []

    def keep(x: Tensor) -> None:
        read[:] = [x]

    def replaced(y: Tensor) -> Tensor:
        return edit(read.pop(), y)

    return [(adapter.hook_point(reads), keep), (adapter.hook_point(writes), _replace(writes, replaced, current))]


def _replace(site: Site, edit: Edit, current: _Mask) -> Visitor:
    def visit(x: Tensor) -> Tensor:
        mask = current.tensor
        if mask is None:
            raise ModelError(f"splice at {site}: only a part of the model was called; call the whole model, or give a mask")
        if mask.shape != x.shape[:-1]:
            raise ShapeMismatch(
                f"splice at {site}: the mask has shape {tuple(mask.shape)}, this pass {tuple(x.shape[:-1])}; "
                "give one entry for each token"
            )
        replaced = edit(x)
        if replaced.shape != x.shape:
            raise ShapeMismatch(
                f"splice at {site}: the edit returned shape {tuple(replaced.shape)} for {tuple(x.shape)}; it must keep the shape"
            )
        return torch.where(mask.to(x.device)[..., None], replaced.to(x), x)

    return visit
