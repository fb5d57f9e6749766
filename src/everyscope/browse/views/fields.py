"""Fields of the pages that ask the language model: what a form or an address holds, checked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.browse.live import MAX_TEXT
from everyscope.browse.queries import Index, SaeFacts
from everyscope.circuits.config import MAX_DIGITS

Query = Mapping[str, Sequence[str]]
"""Every value of each name."""
INDEX_SECONDS = 60.0
"""How long a page that asks the language model waits for the index of an SAE that it needs [s]."""
CODE = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
PROSE = "The telephone was invented in 1876 by Alexander Graham Bell, who was born in Edinburgh and moved to Canada."
EXAMPLES = {"tiny": (CODE, "def read(self, path):\n")}
"""By model, a text to read and a prompt, where it knows no prose."""


def example(index: Index) -> tuple[str, str]:
    """A text and a prompt to begin with."""
    return EXAMPLES.get(index.suite.get("model", ""), (PROSE, PROSE[: PROSE.index(", who")]))


def default_sae(index: Index) -> SaeFacts:
    """What the forms offer first: a canonical SAE of the residual stream in the middle of the model, or the nearest to it."""
    layers = sorted({sae.site.layer for sae in index.saes})
    middle = layers[len(layers) // 2]
    return min(
        index.saes,
        key=lambda sae: (sae.site.kind != "resid_post", abs(sae.site.layer - middle), not sae.is_canonical, sae.number),
    )


def read_sae(index: Index, folder: str) -> SaeFacts:
    """The SAE that an address names; ConfigError where the suite has none such."""
    sae = index.find(folder) if folder else default_sae(index)
    if sae is None:
        raise ConfigError(f"{folder[:200]!r}: this suite has no such SAE; choose one from the list")
    return sae


def read_text(query: Query, name: str) -> str:
    """A text or a prompt; ConfigError where it is too long."""
    text = first(query, name).replace("\r\n", "\n")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the {name} has {len(text):,} characters, at most {MAX_TEXT:,} are read at once; shorten it")
    return text


def read_latent(typed: str, sae: SaeFacts) -> int:
    """A latent's number; ConfigError for what is none of this SAE."""
    typed = typed.strip()
    # Of a number too long for any SAE Python would refuse to make an int.
    if not typed.isdecimal() or len(typed) > MAX_DIGITS or int(typed) >= sae.width:
        raise ConfigError(f"latent {typed[:40]!r}: expected a number from 0 to {sae.width - 1}")
    return int(typed)


def first(query: Query, name: str) -> str:
    """The first value of a name; "" where there is none."""
    return next(iter(query.get(name, ())), "")


def number(typed: str, name: str, default: float, low: float, high: float) -> float:
    """A number; `default` where nothing was typed, ConfigError for what is none or outside."""
    typed = typed.strip()
    if not typed:
        return default
    try:
        value = float(typed)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{name} {typed[:40]!r}: expected a number from {low:g} to {high:g}")
    return value


def captioned(index: Index, links: Any, sae: SaeFacts, latents: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Latents of one SAE by number, as the templates name them: number, address, label or top tokens."""
    captions = index.captions((sae, latent) for latent in latents)
    unknown: dict[str, Any] = {"label": None, "quality": None, "top": []}
    return {
        latent: {"latent": latent, "href": links.latent(sae.folder, latent), **captions.get((sae.number, latent), unknown)}
        for latent in latents
    }
