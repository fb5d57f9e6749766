"""examples.safetensors of Gemma Scope 2: for each latent the tokens on which it was strongest, as its makers' own code saw them.

Such a file lies beside some coders. It trains and describes nothing here; it is a second opinion on the coder beside it: the same
tokens through the model and the coder must give the same activations. `disagreement` says how far they are apart, which shows a
wrong site, a gain that was left out, or a transposed encoder, before any number is believed.

The release does not document the file. What its tensors are called and their shapes are facts; that `seq_ids` are rows of
`tokens` is our reading, which `disagreement` tests too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.base.files import require_file, unreadable
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.model import LanguageModel

EXAMPLES_FILE = "examples.safetensors"
BY_EXAMPLE = ("activations", "positions", "seq_ids", "logit_effects")
BY_TOKEN = ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")
SEQUENCES, FREQUENCIES = "tokens", "feature_frequencies"


@dataclass(frozen=True)
class ReleasedExamples:
    """One latent's examples, strongest first, of those that are above zero."""

    latent: int
    frequency: float
    """Share of tokens on which it fires [1]."""
    activations: Float32[Tensor, " examples"]
    positions: Int64[Tensor, " examples"]
    """Of the token in its sequence."""
    sequences: Int64[Tensor, "examples ctx"]
    """Token ids, BOS first."""
    logit_effects: Float32[Tensor, " examples"]
    top: dict[int, float]
    """Token ids that its direction raises most, with how much."""
    bottom: dict[int, float]


def read_examples(folder: Path, latent: int) -> ReleasedExamples:
    """Those of one latent, read alone, for a file holds a thousand of each.

    DataError or DamagedData where there is no such file, ShapeMismatch for tensors of other shapes or missing sequences.
    """
    path = folder / EXAMPLES_FILE
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            missing = {*BY_EXAMPLE, *BY_TOKEN, SEQUENCES, FREQUENCIES} - set(file.keys())
            if missing:
                raise ShapeMismatch(f"{path}: has no tensor {min(missing)}; is it Gemma Scope 2's?")
            width, number = file.get_slice("activations").get_shape()
            for name in BY_EXAMPLE:
                if (got := file.get_slice(name).get_shape()) != [width, number]:
                    raise ShapeMismatch(f"{path}: {name} has shape {got}, activations {[width, number]}")
            if not 0 <= latent < width:
                raise ConfigError(f"{path}: has no latent {latent}; it has 0 to {width - 1}")
            one = {name: file.get_slice(name)[latent] for name in (*BY_EXAMPLE, *BY_TOKEN, FREQUENCIES)}
            tokens = file.get_slice(SEQUENCES)
            num_sequences, ctx = tokens.get_shape()
            order = one["activations"].argsort(descending=True, stable=True)
            order = order[one["activations"][order] > 0]
            rows, positions = one["seq_ids"][order].long(), one["positions"][order].long()
            if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < num_sequences and int(positions.max()) < ctx):
                raise ShapeMismatch(f"{path}: latent {latent} names sequences or positions beyond tokens {[num_sequences, ctx]}")
            sequences = torch.stack([tokens[row] for row in rows.tolist()]) if len(rows) else torch.empty(0, ctx)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error
    top, bottom = (
        dict(zip(one[f"{side}_tokens"].tolist(), one[f"{side}_logits"].tolist(), strict=True)) for side in ("top", "bottom")
    )
    numbers = one["activations"][order].float(), positions, sequences.long(), one["logit_effects"][order].float()
    return ReleasedExamples(latent, float(one[FREQUENCIES]), *numbers, top, bottom)


@torch.no_grad()
def disagreement(examples: ReleasedExamples, coder: Sae, model: LanguageModel, most: int = 8) -> float:
    """The largest difference between released activations and ours, of the strongest `most`, as a share of the strongest [1].

    0 up to the model's rounding where coder, model and our reading of the file are right.

    ConfigError for a coder that does not say its site, or takes the norm's output without the gain; DataError without examples.
    """
    site = coder.metadata.site
    if site is None or coder.metadata.convention == "normalised":
        raise ConfigError(f"{coder!r} takes no activations that a site has; Gemma Scope 2's say their site, and take the gain")
    if not len(examples.activations):
        raise DataError(f"latent {examples.latent} has no example above zero; choose another")
    wanted = examples.activations[:most]
    x = capture(model, site, examples.sequences[:most])
    seen = x[torch.arange(len(wanted)), examples.positions[:most]].float().cpu()
    ours = coder.encode(seen)[:, examples.latent]
    return float((ours - wanted).abs().max() / wanted.max())
