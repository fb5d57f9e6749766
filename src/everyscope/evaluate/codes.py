"""Which latents fire where, for several SAEs on the same held-out rows, from one clean pass per batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.evaluate.calibration import calibrate
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.held_out import ranges_of, read_held_out
from everyscope.evaluate.layouts import of_mlp_inputs
from everyscope.evaluate.passes import CHUNK_ACTIVATIONS, rows_at
from everyscope.evaluate.rounding import rounded
from everyscope.evaluate.targets import EvaluateTarget
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.model import load_language_model
from everyscope.sites.names import places_of


@dataclass(frozen=True)
class RowCodes:
    """The firings of one SAE on the rows of one batch, by row and then latent; on the CPU."""

    num_rows: int
    """Usual rows of the batch, firing or not; the same for all SAEs of a site [tokens]."""
    row: Int[Tensor, " firings"]
    """Row within the batch, int64."""
    latent: Int[Tensor, " firings"]
    """Latent, int64."""
    value: Float[Tensor, " firings"]
    """Its activation in raw units, > 0, float32."""


def codes_of(config: EvaluateConfig, targets: Sequence[EvaluateTarget], num_sequences: int) -> Iterator[dict[str, RowCodes]]:
    """The codes of `targets`, by identity, on the first `num_sequences` held-out blocks, a batch at a time.

    Rows come in the same order for every SAE of a site, so that codes of two can be joined; massive ones are left out. One batch
    is in memory at a time, beside the SAEs. Raises as an evaluation does.
    """
    config = config.model_copy(update={"num_sequences": num_sequences})
    held_out, device = read_held_out(config), torch.device(config.model.device)
    language = load_language_model(config.model)
    model = language.model
    saes = {
        target.identity: rounded(of_mlp_inputs(target.sae(), language.adapter, target.site.layer).to(device), config.sae_dtype)
        for target in targets
    }
    sites = sorted({target.site for target in targets})
    places = sorted(places_of(sites))
    calibrations = calibrate(config, places, language)
    ranges = ranges_of(held_out.num_sequences, (held_out.num_sequences, config.batch_blocks))
    for batch in held_out.batches(ranges, device):
        activations = capture(model, places, batch.input_ids)
        rows = {site: rows_at(site, activations, batch, calibrations).read for site in sites}
        yield {target.identity: sparse_codes(saes[target.identity], rows[target.site]) for target in targets}


@torch.no_grad()
def sparse_codes(sae: Sae, rows: Float[Tensor, "n d_in"]) -> RowCodes:
    """Where the latents of `sae` fire on `rows`, a chunk of rows at a time."""
    chunk = max(1, CHUNK_ACTIVATIONS // sae.d_sae)
    parts = []
    for start in range(0, len(rows), chunk):
        f = sae.encode(rows[start : start + chunk])
        row, latent = (f > 0).nonzero(as_tuple=True)
        parts.append((row.cpu() + start, latent.cpu(), f[row, latent].float().cpu()))
    empty = torch.zeros(0, dtype=torch.int64)
    row, latent, value = (torch.cat(column) for column in zip(*parts, strict=True)) if parts else (empty, empty, torch.zeros(0))
    return RowCodes(len(rows), row, latent, value)
