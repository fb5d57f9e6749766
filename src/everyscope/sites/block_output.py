"""What a block hands on: a tensor (most of transformers 5) or a tuple that starts with it (4.5x).

Annotations do not tell: Gemma 3's block of transformers 5 is annotated with a tuple and returns a tensor. Running a block
does, but runs everyone's hooks with it; so a twin of it is run, on the meta device, where nothing is computed or stored.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN: dict[type[nn.Module], bool] = {}
"""Whether a class of blocks returns tuples, once we know."""


def returns_tuple(block: nn.Module, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `block`, built from `config` and called with these arguments, returns a tuple. Neither runs nor changes it."""
    kind = type(block)
    if kind not in _KNOWN:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # the others bring kernels that know no meta device
        # They also bring masks of other forms, and no mask is a mask that every block takes.
        kwargs = {name: None if name == "attention_mask" else _meta(value) for name, value in kwargs.items()}
        build: Any = kind
        with torch.device("meta"), torch.no_grad():
            twin = build(config, 0).to(next(block.parameters()).dtype).eval()
            _KNOWN[kind] = isinstance(twin(*(_meta(value) for value in args), **kwargs), tuple)
    return _KNOWN[kind]


def _meta(value: Any) -> Any:
    """`value` without its data. Caches become None, for the twin must not write into them."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_meta(item) for item in value)
    return value if isinstance(value, bool | int | float | str) else None
