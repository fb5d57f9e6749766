"""The names of the places in a language model where SAEs sit. Torch-free: configs and recipes speak of sites too."""

from dataclasses import dataclass
from typing import Literal, get_args

from everyscope.base.errors import ConfigError

SiteKind = Literal["attn_out", "mlp_out", "resid_post", "embed"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
SUBLAYERS: tuple[SiteKind, ...] = ("attn_out", "mlp_out", "resid_post")
"""The kinds that every layer has; `embed` exists once, as layer 0."""


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model, as in Site("resid_post", 3).

    attn_out: the heads' outputs, concatenated, before W_O (width heads x head_dim); mlp_out: what the MLP adds to the
    residual stream, after its post-norm where there is one; resid_post: the residual stream behind the block; embed: the
    embedding as it enters the first block.
    """

    kind: SiteKind
    layer: int

    def __post_init__(self) -> None:
        """Refuse names and layers that no model can have."""
        if self.kind not in SITE_KINDS:
            raise ConfigError(f"unknown site {self.kind!r}; the sites are {', '.join(SITE_KINDS)}")
        if self.layer < 0 or (self.kind == "embed" and self.layer != 0):
            raise ConfigError(f"{self.kind} has no layer {self.layer}; layers count from 0, and embed is at layer 0")

    @property
    def folder(self) -> str:
        """Where the site's files lie below shards/, train/ and suite/: `resid_post/layer_3`."""
        return f"{self.kind}/layer_{self.layer}"

    def __str__(self) -> str:
        return f"{self.kind} layer {self.layer}"


def parse_folder(folder: str) -> Site:
    """The site whose `folder` this is; ConfigError for anything else."""
    kind, _, layer = folder.partition("/layer_")
    if kind not in SITE_KINDS or not layer.isdigit():
        raise ConfigError(f"{folder!r} names no site; expected something like resid_post/layer_3")
    return Site(kind, int(layer))


def sites_of(kinds: tuple[SiteKind, ...], layers: tuple[int, ...] | None, num_layers: int) -> tuple[Site, ...]:
    """The sites of `kinds` at `layers` (None: all), in order of layer; ConfigError for a layer beyond `num_layers`."""
    chosen = tuple(range(num_layers)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"layer {layer} is out of range: the model has layers 0 to {num_layers - 1}; mend layers=...")
    sites = [Site(kind, layer) for layer in chosen for kind in kinds if kind != "embed"]
    return ((Site("embed", 0),) if "embed" in kinds else ()) + tuple(sites)
