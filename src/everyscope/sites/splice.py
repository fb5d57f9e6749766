"""Forward passes with some activations replaced: by SAEs' reconstructions, by zeros, by whatever a function makes of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from everyscope.base.errors import ModelError, ShapeMismatch
from everyscope.sites.block_output import returns_tuple
from everyscope.sites.hooks import Visitor, visiting
from everyscope.sites.names import Site
from everyscope.sites.registry import anatomy_of

Edit = Callable[[Float[Tensor, "batch ctx d_in"]], Float[Tensor, "batch ctx d_in"]]
"""What replaces activations: a function of them that keeps their shape. An Sae is one."""


@contextmanager
def splice(model: nn.Module, edits: Mapping[Site, Edit], mask: Bool[Tensor, "batch ctx"] | None = None) -> Iterator[None]:
    """Inside the block, every forward pass replaces the activations at each site by `edits[site]` of them.

    `mask` is True where to replace; other positions pass through bit for bit. Without one, BOS, EOS and padding (by the
    model's config, in the input_ids of each pass) pass through. The edit sees all positions. Everything is undone at the
    end, after errors too. ConfigError for a layer that the model does not have; while a pass runs, ShapeMismatch for an
    edit or mask of the wrong shape, and ModelError where a mask must be made but the pass has no input_ids.
    """
    anatomy = anatomy_of(model)
    current = _Mask(mask)
    visits = [(anatomy.place(site), _replace(site, edit, current)) for site, edit in edits.items()]
    with ExitStack() as stack:
        if mask is None:
            stack.enter_context(current.following(model))
        stack.enter_context(visiting(visits))
        yield


@contextmanager
def resuming(model: nn.Module, layer: int, resid: Float[Tensor, "batch ctx d_model"]) -> Iterator[None]:
    """Inside the block, blocks 0 to `layer` compute nothing and return `resid`, the output of block `layer` in an earlier pass.

    So a pass costs only the layers above, and a splice at resid_post of `layer`, or above, meets what it would meet in a
    full pass. With layer=-1 nothing is skipped. The passes must have the input_ids that `resid` is from, and
    use_cache=False: the skipped blocks leave no keys and values. ConfigError for a layer that the model does not have,
    ShapeMismatch where `resid` fits neither model nor input.
    """
    anatomy = anatomy_of(model)
    if layer != -1:
        anatomy.block(layer)
    if resid.shape[-1] != anatomy.d_model:
        raise ShapeMismatch(f"resid has width {resid.shape[-1]}, the model {anatomy.d_model}; capture resid_post of this model")

    def shortcut(block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape != resid.shape:
                raise ShapeMismatch(
                    f"resid has shape {tuple(resid.shape)}, this pass works on {tuple(hidden.shape)}; "
                    "give the input_ids that it was captured from"
                )
            moved = resid.to(hidden)
            return (moved,) if returns_tuple(block, anatomy.config, args, kwargs) else moved

        return forward

    with ExitStack() as stack:
        for block in anatomy.blocks[: layer + 1]:
            stack.enter_context(_forward_replaced(block, shortcut(block)))
        yield


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
        self.tensor = mask

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Make the mask anew in each forward pass of `model`: True but at BOS, EOS and padding."""
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
