"""Folders that hold SAEs and transcoders, and how each tells the site: our training and suites, and every format that is read.

A suite is read by its folders, not by its index, so that suites of any version can be measured.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from everyscope.base.errors import ConfigError
from everyscope.base.files import sha256
from everyscope.sae.conventions import to_convention
from everyscope.sae.files import TENSOR_FILE, trained_folders, weights_digest
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.names import Site, SiteKind, parse_folder
from everyscope.sites.norms import mlp_norm_of
from everyscope.sites.registry import ModelAdapter
from everyscope.suite.formats.known import coders_below

RELEASE_KINDS: dict[str, SiteKind] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "embedding": "embed"}
"""The last word of a Gemma Scope repository's name, or a folder's name in it, and the site it stands for."""
UNSCALED = "embedding"
"""The folder of Gemma Scope's SAEs of the embedding matrix."""
PROBE_TOKENS = 64
"""Tokens by which the factor between embedding matrix and embeddings is found [tokens]."""
PROPORTIONAL = 1e-2
"""Largest relative error with which embeddings are a multiple of the matrix's rows; bfloat16 takes some of it [1]."""


@dataclass(frozen=True)
class FoundSae:
    """One SAE on disk."""

    site: Site
    name: str
    """Its folder below that of its site."""
    folder: Path
    """Its folder; of a set, whose folder holds all layers, its file."""
    weights: Path
    """The file that holds its tensors."""
    digest: str
    """SHA-256 of that file: the one that an SAE's record has, and so not read again, or the file's own."""
    is_of_unscaled_embeddings: bool = False
    """Whether it was trained on rows of the embedding matrix."""


def saes_of_training(trained: Path) -> Iterator[FoundSae]:
    """The finished SAEs of `everyscope train`."""
    for folder in trained_folders(trained):
        site = parse_folder(folder.parent.relative_to(trained).as_posix())
        yield FoundSae(site, folder.name, folder, folder / TENSOR_FILE, weights_digest(folder))


def saes_of_release(trained: Path, site_kind: SiteKind | None) -> Iterator[FoundSae]:
    """Our suites, <site>/layer_<L>/..., Gemma Scope's releases, <release>/layer_<L>/... and <release>/embedding/..., and files of
    every other format that is read here, most of which name their site.

    A site is what the files say, or the kind that the folders from `trained` down tell, or `site_kind`, or the folders above, in
    this order. ConfigError where none of them tells it.
    """
    root = trained.absolute()
    for one, weights in coders_below(root):
        folder = one.folder(weights)
        above, inside = root.parent.parts, (root.name, *folder.relative_to(root).parts)
        known_site = one.known(weights).coder_site
        site = known_site or _of_path(weights, above, inside, site_kind)
        embeds = [part for part in (*above, *inside) if part in ("embed", UNSCALED)]
        is_unscaled = known_site is None and site.kind == "embed" and embeds[-1:] == [UNSCALED]
        name = "/".join(inside[1:]) if one.is_set else _name(inside)
        yield FoundSae(site, name or "sae", weights if one.is_set else folder, weights, sha256(weights), is_unscaled)


def _name(inside: Sequence[str]) -> str:
    """What is behind the layer of a path, or, where it names no layer, all of it."""
    layers = [place for place, part in enumerate(inside) if re.fullmatch(rf"layer_\d+|{UNSCALED}", part)]
    return "/".join(inside[layers[-1] + 1 :]) if layers else "/".join(inside[1:]) or inside[-1]


def _of_path(weights: Path, above: Sequence[str], inside: Sequence[str], site_kind: SiteKind | None) -> Site:
    kind = _kind(inside) or site_kind or _kind(above)
    if kind is None:
        raise ConfigError(
            f"{weights}: the kind of site cannot be read from its path; set site_kind={' or '.join(get_args(SiteKind))}"
        )
    if kind == "embed":
        return Site(kind, 0)
    layers = [part for part in (*above, *inside) if re.fullmatch(r"layer_\d+", part)]
    if not layers:
        raise ConfigError(f"{weights}: the layer cannot be read from its path; expected a folder like layer_12 above it")
    return Site(kind, int(layers[-1].removeprefix("layer_")))


def _kind(parts: Sequence[str]) -> SiteKind | None:
    """The kind of site that folders' names tell, the innermost first."""
    for part in reversed(parts):
        word = part.rpartition("-")[2]
        if part in get_args(SiteKind):
            return next(kind for kind in get_args(SiteKind) if kind == part)
        if word in RELEASE_KINDS and (word != part or word == UNSCALED):
            return RELEASE_KINDS[word]
    return None


def of_mlp_inputs(coder: Sae, adapter: ModelAdapter, layer: int) -> Sae:
    """A transcoder as one of what `mlp_in` captures: the gain of the model's norm is taken into one that reads without it.

    All others, SAEs and transcoders of the residual stream before the norm, stay as they are.
    """
    if coder.metadata.convention != "normalised":
        return coder
    norm = mlp_norm_of(adapter, layer)
    return to_convention(coder, "mlp_input", norm.gain, norm.bias)


def of_embeddings(sae: Sae, scale: float) -> Sae:
    """An SAE of rows e of the embedding matrix, as one of what enters the first block, x = scale e: the same latents.

    e @ W_enc = x @ (W_enc / scale), and scale (f @ W_dec + b_dec) = f @ (scale W_dec) + scale b_dec; b_enc and threshold stay.
    """
    return sae.with_tensors(W_enc=sae.W_enc / scale, W_dec=sae.W_dec * scale, b_dec=sae.b_dec * scale)


@torch.no_grad()
def embedding_scale(model: nn.Module) -> float:
    """What the model multiplies rows of its embedding matrix by before the first block, as sqrt(d_model) in Gemma.

    1 where what enters is no multiple of them, as with position embeddings.
    """
    matrix: torch.Tensor = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    ids = torch.linspace(0, len(matrix) - 1, PROBE_TOKENS).long()
    site = Site("embed", 0)
    entering, rows = capture(model, [site], ids[None])[site][0].double().cpu(), matrix[ids.to(matrix.device)].double().cpu()
    scale = float((entering * rows).sum() / rows.square().sum())
    error = float((entering - scale * rows).norm() / entering.norm())
    return scale if error < PROPORTIONAL else 1.0
