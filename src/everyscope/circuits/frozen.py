"""A language model held still around one prompt: attention patterns and norms' sizes as they were, so that blocks are affine.

One clean pass keeps what is needed: queries and keys, each norm's size at each token, what MLPs wrote. A block run afterwards
has its own modules for values, output projections, gains and biases; its MLP adds what a caller says. So every family of the
registry takes the same way, parallel blocks, post-norms, grouped heads and soft-caps included. Patterns are computed from
queries and keys as often as they are needed, and held for one layer at a time: those of a long prompt would fill the memory.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.hooks import visiting
from everyscope.sites.logits import final_norm
from everyscope.sites.names import Site
from everyscope.sites.norms import Affine, affine_of
from everyscope.sites.registry import HookPoint, ModelAdapter
from everyscope.sites.splice import forward_replaced

INTERFACE = "everyscope_circuits"
"""Our name among transformers' implementations of attention; it asks the module's handler."""
Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""attend(module, query, key, value, mask, **options): heads' outputs [batch ctx heads head_dim] and their patterns."""
Write = Callable[[Float[Tensor, "1 ctx d_model"]], Float[Tensor, "1 ctx d_model"]]
"""What an MLP adds to the stream, made of what its transcoder reads."""
_HANDLERS: WeakKeyDictionary[nn.Module, Attend] = WeakKeyDictionary()


def _attend(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    return _HANDLERS[module](module, *args, **options)


AttentionInterface.register(INTERFACE, _attend)


def eager(module: nn.Module) -> Attend:
    """The plain attention of the module's own family."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ModelError(f"{type(module).__name__} has no eager_attention_forward beside it: use transformers 4.51 or newer")
    return found


@contextmanager
def attending(module: nn.Module, handler: Attend) -> Iterator[None]:
    """Inside the block, this attention module hands queries, keys and values to `handler` in place of its own attention."""
    config: Any = module.config
    forward = module.forward

    def handled(*args: Any, **kwargs: Any) -> Any:
        before = config._attn_implementation
        config._attn_implementation = INTERFACE  # only now: the model reads it too, to choose a form of masks
        _HANDLERS[module] = handler
        try:
            return forward(*args, **kwargs)
        finally:
            config._attn_implementation = before
            del _HANDLERS[module]

    with forward_replaced(module, handled):
        yield


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with its size at each token held still: x -> size * gain * (x - its mean, if centring) + bias."""

    affine: Affine
    is_centring: bool
    size: Float[Tensor, "1 ctx 1"]

    def __call__(self, x: Float[Tensor, "batch ctx d_model"]) -> Float[Tensor, "batch ctx d_model"]:
        """What the norm gives."""
        return self.size * self.affine.gain * self._centred(x) + self.affine.bias

    def pulled_back(self, g: Float[Tensor, "rows d_model"], position: int) -> Float[Tensor, "rows d_model"]:
        """The gradient before the norm of one behind it, at one position."""
        return self._centred(self.size[0, position] * self.affine.gain * g)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.is_centring else x


@dataclass(frozen=True, eq=False)
class KnownNorm:
    """What is known of a norm before it runs. A copy of it runs to find that, and hooks are copied too: so this comes first."""

    affine: Affine
    is_centring: bool

    def frozen(self, x: Float[Tensor, "1 ctx d_model"], y: Float[Tensor, "1 ctx d_model"]) -> FrozenNorm:
        """The norm as it was when it made y of x; its size is the least-squares one, so that no epsilon need be known."""
        affine = Affine(self.affine.gain.to(x), self.affine.bias.to(x))
        gained = affine.gain * (x - x.mean(-1, keepdim=True) if self.is_centring else x)
        length = gained.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return FrozenNorm(affine, self.is_centring, ((y - affine.bias) * gained).sum(-1, keepdim=True) / length)


def known_norm(norm: nn.Module, d_model: int) -> KnownNorm:
    """Find it out; ModelError where it is neither RMSNorm nor LayerNorm."""
    return KnownNorm(affine_of(norm, d_model), isinstance(norm, nn.LayerNorm))


@dataclass(eq=False)
class FrozenBlock:
    """What the clean pass left of one block."""

    block: nn.Module
    attention: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What the block was called with beside the stream."""
    attended: tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]] | None = None
    """Queries, keys, and what came with them."""
    norms: dict[nn.Module, FrozenNorm] = field(default_factory=dict)
    added: Float[Tensor, "1 ctx d_model"] | None = None
    """What the MLP added to the stream."""

    def call(self, resid: Float[Tensor, "1 ctx d_model"]) -> Float[Tensor, "1 ctx d_model"]:
        """Run it on another stream."""
        kwargs = {**self.kwargs, "hidden_states": resid} if "hidden_states" in self.kwargs else self.kwargs
        output = self.block(*(() if "hidden_states" in self.kwargs else (resid,)), *self.args[1:], **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        """Attention by the patterns of the clean pass: linear in the values."""
        assert self.attended is not None, "the clean pass did not reach this block's attention"
        query, key, rest, options = self.attended
        return eager(module)(module, query, key, value, *rest, **options)


class FrozenModel:
    """The frozen blocks of a model on one prompt, and its clean logits at the last position."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter, input_ids: Int[Tensor, "1 ctx"]) -> None:
        """Make the clean pass; the model is left as it was.

        ConfigError for more than one sequence, and for a model in a number format too coarse for sums to hold.
        """
        if input_ids.ndim != 2 or input_ids.shape[0] != 1:
            raise ConfigError(f"input_ids have shape {tuple(input_ids.shape)}; a graph is of one prompt: give [1, ctx]")
        dtype = next(model.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            known = str(dtype).removeprefix("torch.")
            raise ConfigError(f"the model is in {known}, too coarse for a graph's sums; load it with dtype='float32'")
        self.model, self.adapter = model, adapter
        self.input_ids = input_ids.to(next(model.parameters()).device)
        self.blocks = [FrozenBlock(block, adapter.attention(layer).module) for layer, block in enumerate(adapter.blocks)]
        self._final_module = final_norm(model, adapter)
        self.embed, self.final, behind = self._clean_pass()
        self.logits: Float[Tensor, " vocab"] = self.capped(self.raw_logits(behind[0, -1]))

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def context(self) -> int:
        """Tokens of the prompt [tokens]."""
        return self.input_ids.shape[1]

    @property
    def norms(self) -> list[tuple[nn.Module, FrozenNorm]]:
        """The norms on the stream, of all blocks and the final one, and what each is when held still."""
        inside = [pair for block in self.blocks for pair in block.norms.items()]
        return [*inside, (self._final_module, self.final)]

    def added(self, layer: int) -> Float[Tensor, "ctx d_model"]:
        """What the MLP of `layer` added in the clean pass."""
        added = self.blocks[layer].added
        assert added is not None, f"the clean pass did not see what the MLP of layer {layer} added"
        return added[0]

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The rows that meet the final norm's output."""
        head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        return head.weight.detach()

    def raw_logits(self, behind_norm: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Logits before any soft-cap."""
        head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        return head(behind_norm)

    def capped(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """Logits as the model gives them."""
        cap = getattr(self.adapter.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def _clean_pass(self) -> tuple[Tensor, FrozenNorm, Tensor]:
        """Fill the blocks; the embedding as it enters the first one, the final norm, and what it gave."""
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            known = known_norm(self._final_module, self.adapter.d_model)
            for layer, frozen in enumerate(self.blocks):
                _record(stack, frozen, self.adapter.hook_point(Site("mlp_out", layer)))

            def enter(x: Tensor) -> None:
                found["embed"] = x.clone()

            def keep(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                found["final"], found["behind"] = known.frozen(args[0], output), output

            stack.enter_context(visiting([(HookPoint(self.blocks[0].block, "input"), enter)]))
            stack.callback(self._final_module.register_forward_hook(keep).remove)
            self.model(input_ids=self.input_ids, use_cache=False)
        return found["embed"], found["final"], found["behind"]

    def run_block(
        self, layer: int, resid: Float[Tensor, "1 ctx d_model"], write: Write, read: HookPoint
    ) -> tuple[Float[Tensor, "1 ctx d_model"], Float[Tensor, "1 ctx d_model"]]:
        """The frozen block of `layer` on a stream: what is found at the place `read`, and the stream behind the block.

        Its MLP does not run; it adds write(found).
        """
        frozen, seen = self.blocks[layer], {}

        def see(x: Tensor) -> None:
            seen["read"] = x

        with ExitStack() as stack:
            stack.enter_context(attending(frozen.attention, frozen.attend))
            for norm, still in frozen.norms.items():
                stack.enter_context(forward_replaced(norm, still))
            stack.enter_context(forward_replaced(self.adapter.mlp_parts(layer)[0], torch.zeros_like))
            added = self.adapter.hook_point(Site("mlp_out", layer))
            stack.enter_context(visiting([(read, see), (added, lambda _: write(seen["read"]))]))
            out = frozen.call(resid)
        return seen["read"], out


def _record(stack: ExitStack, frozen: FrozenBlock, added: HookPoint) -> None:
    """Let the next pass fill `frozen`; hooks come off with the stack."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frozen.args, frozen.kwargs = args, {name: value for name, value in kwargs.items() if name != "hidden_states"}
        frozen.kwargs |= {"hidden_states": None} if "hidden_states" in kwargs else {}

    known = {norm: known_norm(norm, next(norm.parameters()).shape[0]) for norm in frozen.block.children() if _is_norm(norm)}

    def normed(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        frozen.norms[norm] = known[norm].frozen(args[0], output)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        frozen.attended = (query, key, rest, options)
        return eager(module)(module, query, key, value, *rest, **options)

    def add(x: Tensor) -> None:
        frozen.added = x.clone()

    stack.callback(frozen.block.register_forward_pre_hook(called, with_kwargs=True).remove)
    for norm in known:
        stack.callback(norm.register_forward_hook(normed).remove)
    stack.enter_context(attending(frozen.attention, attend))
    stack.enter_context(visiting([(added, add)]))


def _is_norm(module: nn.Module) -> bool:
    """Whether a part of a block is a norm: nothing inside but vectors."""
    return not any(module.children()) and {parameter.ndim for parameter in module.parameters()} == {1}
