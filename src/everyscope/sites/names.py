"""The names of the places in a language model where SAEs sit. Torch-free: configs and recipes name sites too."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from everyscope.base.errors import ConfigError

SiteKind = Literal["attn_out", "mlp_out", "resid_post", "embed", "mlp_in", "resid_mid", "transcoder", "resid_transcoder"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
SUBLAYERS: tuple[SiteKind, ...] = ("attn_out", "mlp_out", "resid_post")
"""The kinds at which Gemma Scope has SAEs on every layer; `embed` exists once, as layer 0."""
HOOKS: dict[SiteKind, str] = {
    "attn_out": "blocks.{layer}.attn.hook_z",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "embed": "hook_embed",
    "mlp_in": "blocks.{layer}.mlp.hook_in",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
}
"""TransformerLens's names of the sites that are one place."""
IN_LAYERS: tuple[SiteKind, ...] = tuple(kind for kind in HOOKS if kind != "embed")
"""The kinds that are one place in every layer."""
TRANSCODER_READS: dict[SiteKind, SiteKind] = {"transcoder": "mlp_in", "resid_transcoder": "resid_mid"}
"""The kinds that are two places, with what is read there; both write mlp_out."""
InputConvention = Literal["normalised", "mlp_input", "residual"]
"""In which form a transcoder takes what an MLP reads. normalised: behind the norm, without its gain (Gemma Scope 1). mlp_input:
what the MLP module itself receives, with the gain, as mlp_in has it (Gemma Scope 2, Qwen). residual: the stream before the norm,
resid_mid. The first two convert into each other exactly (`sae.conventions`); the norm lies between them and the third."""
CONVENTIONS: dict[str, InputConvention] = {"mlp_in": "mlp_input", "resid_mid": "residual"}
"""The convention of what is captured at a kind of site."""
SITE_TITLES: dict[SiteKind, str] = {
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "resid_post": "Residual stream",
    "embed": "Embedding",
    "mlp_in": "MLP input",
    "resid_mid": "Residual stream before the MLP",
    "transcoder": "Transcoder",
    "resid_transcoder": "Transcoder of the residual stream",
}
"""Of kinds of sites, for people."""
_OURS = re.compile(rf"({'|'.join((*IN_LAYERS, *TRANSCODER_READS))})(?:/layer_|/| layer |\.)(\d+)")
_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)")
"""A block as a module of a Hugging Face model, as in model.layers.3; its output is resid_post."""
Value = TypeVar("Value")


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model, as in Site("resid_post", 3).

    attn_out: the heads' outputs, concatenated, before W_O (width heads x head_dim); mlp_out: what the MLP adds to the
    residual stream, after its post-norm where there is one; resid_post: the residual stream behind the block; embed: the
    embedding as it enters the first block; mlp_in: what the MLP module itself receives, normalised and with the norm's gain
    where there is a norm; resid_mid: the residual stream as that norm receives it.

    transcoder is where a transcoder sits and not one place but two: it reads mlp_in and writes mlp_out. resid_transcoder is where
    one sits that reads resid_mid, and so computes the norm before the MLP too.
    """

    kind: SiteKind
    layer: int

    def __post_init__(self) -> None:
        """Refuse names and layers that no model can have."""
        if self.kind not in SITE_KINDS:
            close = difflib.get_close_matches(str(self.kind), SITE_KINDS, 1)
            hint = f"did you mean {close[0]}?" if close else "choose one of these"
            raise ConfigError(f"unknown site {self.kind!r}; the sites are {', '.join(SITE_KINDS)}; {hint}")
        if not isinstance(self.layer, int):
            raise ConfigError(f"{self.kind}: layer={self.layer!r} is no whole number; write Site({self.kind!r}, 3)")
        if self.layer < 0 or (self.kind == "embed" and self.layer != 0):
            raise ConfigError(f"{self.kind} has no layer {self.layer}; layers count from 0, and embed is at layer 0")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of a name in any of the usual conventions; ConfigError, with the nearest name, for anything else.

        Ours: resid_post.3, resid_post/layer_3, embed. TransformerLens's: blocks.3.hook_resid_post, blocks.3.hook_mlp_out,
        blocks.3.attn.hook_z, blocks.3.mlp.hook_in, blocks.3.hook_resid_mid, hook_embed.
        A Hugging Face block: model.layers.3 or transformer.h.3, which is resid_post.
        """
        if text in ("embed", "embed.0", "embed/layer_0", "embed layer 0", HOOKS["embed"]):
            return cls("embed", 0)
        if found := _OURS.fullmatch(text):
            return cls(found[1], int(found[2]))  # pyright: ignore[reportArgumentType]
        if found := _BLOCK.fullmatch(text):
            return cls("resid_post", int(found[1]))
        for kind in IN_LAYERS:
            if found := re.fullmatch(HOOKS[kind].replace(".", r"\.").format(layer=r"(\d+)"), text):
                return cls(kind, int(found[1]))
        raise ConfigError(f"{text!r} names no site; {_nearest(text)}")

    @property
    def folder(self) -> str:
        """Where the site's files lie below shards/, train/ and suite/: `resid_post/layer_3`."""
        return f"{self.kind}/layer_{self.layer}"

    @property
    def inputs(self) -> tuple["Site", ...]:
        """The places that a coder at this site reads; an SAE reads its own."""
        reads = TRANSCODER_READS.get(self.kind)
        return (self,) if reads is None else (Site(reads, self.layer),)

    @property
    def outputs(self) -> tuple["Site", ...]:
        """The places that a coder at this site writes; an SAE writes its own."""
        return (Site("mlp_out", self.layer),) if self.is_transcoder else (self,)

    @property
    def is_transcoder(self) -> bool:
        """Whether a coder here writes another place than it reads."""
        return self.kind in TRANSCODER_READS

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the place that a coder reads here: `blocks.3.hook_resid_post`."""
        return HOOKS[self.inputs[0].kind].format(layer=self.layer)

    def __str__(self) -> str:
        return f"{self.kind} layer {self.layer}"


def as_site(site: Site | str) -> Site:
    """A site, or the site of a name as `Site.parse` reads it; ConfigError for anything else."""
    if isinstance(site, Site):
        return site
    if isinstance(site, str):
        return Site.parse(site)
    raise ConfigError(f"{site!r} is a {type(site).__name__}, expected a site, as in Site('resid_post', 3) or 'resid_post.3'")


def _nearest(text: str) -> str:
    """What `text` may have been meant for."""
    number = re.search(r"\d+", text)
    layer = int(number[0]) if number else 3
    before = f"'resid_post.{layer - 1}'" if layer else "'embed'"
    for part, meaning in {
        "resid_pre": f"the same activations are {before}",
        "hook_attn_out": f"attn_out lies before W_O, and is written 'attn_out.{layer}' or 'blocks.{layer}.attn.hook_z'",
        "hook_mlp_in": f"what the MLP reads behind its norm is 'mlp_in.{layer}', the stream before that norm 'resid_mid.{layer}'",
        "ln2": f"what the MLP reads, with the norm's gain, is 'mlp_in.{layer}'",
        ".mlp": f"did you mean 'mlp_in.{layer}' or 'mlp_out.{layer}'?",
        "attn": f"did you mean 'attn_out.{layer}'?",
    }.items():
        if part in text:
            return meaning
    names = [f"{kind}.{layer}" for kind in IN_LAYERS] + [HOOKS[kind].format(layer=layer) for kind in IN_LAYERS] + ["embed"]
    close = difflib.get_close_matches(text, names, 1)
    usual = "write it as 'resid_post.3', 'blocks.3.hook_resid_post' or 'model.layers.3'"
    return f"did you mean {close[0]!r}?" if close else f"{usual}; the kinds are {', '.join(SITE_KINDS)}"


class BySite(dict[Site, Value]):
    """A dict by site that finds its entries by a site's names too: found["resid_post.3"]. ConfigError for what names no site."""

    def __getitem__(self, site: Site | str) -> Value:
        known = as_site(site)
        if known not in self:
            raise KeyError(f"{known} is not among {', '.join(map(str, self)) or 'nothing'}")
        return super().__getitem__(known)

    def __contains__(self, site: object) -> bool:
        return super().__contains__(Site.parse(site) if isinstance(site, str) else site)


def sites_in(sites: "Site | str | Iterable[Site | str]") -> tuple[Site, ...]:
    """The sites of one or several sites or names, each once, in order; ConfigError where there is none."""
    several = [sites] if isinstance(sites, Site | str) else sites
    try:
        found = tuple(dict.fromkeys(as_site(site) for site in several))
    except TypeError as error:
        raise ConfigError(f"sites={sites!r}: expected a site or several, as in ['resid_post.3', 'mlp_out.3']") from error
    if not found:
        raise ConfigError("no sites given; name at least one, as in 'resid_post.0'")
    return found


def places_of(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Every place that coders at these sites read or write, once, in order of the sites."""
    return tuple(dict.fromkeys(place for site in sites for place in (*site.inputs, *site.outputs)))


def site_of_convention(site: Site, convention: str | None) -> Site | None:
    """Where a transcoder of this input convention sits at the layer of `site`, if that is a place of another kind."""
    for kind, reads in TRANSCODER_READS.items():
        if site.is_transcoder and kind != site.kind and CONVENTIONS.get(reads) == convention:
            return Site(kind, site.layer)
    return None


def site_of(reads: Site, writes: Site) -> Site | None:
    """Where a coder sits that reads and writes these places; None where no site has both."""
    if reads == writes:
        return reads
    both = [
        site
        for site in (Site(kind, reads.layer) for kind in TRANSCODER_READS)
        if (*site.inputs, *site.outputs) == (reads, writes)
    ]
    return both[0] if both else None


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
            raise ConfigError(f"layer {layer} is out of range: the model has layers 0 to {num_layers - 1}; change layers=...")
    sites = [Site(kind, layer) for layer in chosen for kind in kinds if kind != "embed"]
    return ((Site("embed", 0),) if "embed" in kinds else ()) + tuple(sites)
