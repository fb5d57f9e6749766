"""Feature splitting: which latents of a wider SAE the latents of a narrower one become.

A pair of SAEs sits at one site, has adjacent widths and nearly one L0. Each wide latent gets the narrow latent of nearest decoder
direction as its parent, and a relation: new, matched or split (dictionaries.relations). Nearness is judged against random
dictionaries of the wide one's size, for in few dimensions something always lies near. Firings on held-out text stand beside.

`same_number` is the share of wide latents whose parent has their own number, by chance 1 / wide. More than that comes
from the start: SAEs drawn from one seed begin with the same first directions.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.base.progress import meter, say
from everyscope.base.tables import check_table, write_table
from everyscope.evaluate.calibration import calibrate
from everyscope.evaluate.comparisons.canonical import canonical_saes
from everyscope.evaluate.comparisons.config import SplittingConfig
from everyscope.evaluate.comparisons.dictionaries import nearest, normalised_rows, null_nearest, p_values, relations, shares
from everyscope.evaluate.comparisons.scored import Scored, read_scored
from everyscope.evaluate.comparisons.slices import INPUTS, is_current, left_out, write_slice
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


SLICE, FOLDER = "splitting.json", "splitting"
VERSION = 1
QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the nearest cosines that the slice tells."""


@dataclass(frozen=True)
class Pair:
    """A narrow SAE and a wide one of the same site, and the place of their table."""

    narrow: Scored
    wide: Scored
    table: Path
    """The pair's Parquet file."""
    inputs: str
    """Hash of everything that determines it."""

    @property
    def is_made(self) -> bool:
        """True where the table exists and is of these inputs."""
        if not self.table.exists():
            return False
        try:
            check_table(self.table, "it is measured again")
        except DataError as error:
            say(f"  {error}")
            return False
        metadata = pyarrow.parquet.read_schema(self.table).metadata or {}
        return metadata.get(INPUTS.encode()) == self.inputs.encode()


class FiringCounts:
    """Rows on which latents of a pair fire, counted over batches: alone, and each wide latent together with its parent."""

    def __init__(self, parent: Int64[Tensor, " wide"], num_narrow: int) -> None:
        """Nothing counted; `parent` is the narrow latent of each wide one."""
        self.parent = parent
        self.narrow = torch.zeros(num_narrow, dtype=torch.int64)
        self.wide, self.both = torch.zeros_like(parent), torch.zeros_like(parent)

    def update(self, narrow: RowCodes, wide: RowCodes) -> None:
        """Count one batch: both SAEs' codes of the same rows."""
        width = len(self.narrow)
        fired = (narrow.row * width + narrow.latent).sort().values
        sought = wide.row * width + self.parent[wide.latent]
        place = torch.searchsorted(fired, sought).clamp(max=max(len(fired) - 1, 0))
        is_both = fired[place] == sought if len(fired) else torch.zeros_like(sought, dtype=torch.bool)
        self.narrow += torch.bincount(narrow.latent, minlength=width)
        self.wide += torch.bincount(wide.latent, minlength=len(self.parent))
        self.both += torch.bincount(wide.latent[is_both], minlength=len(self.parent))


def run(config: SplittingConfig) -> Path:
    """Write slices/splitting.json and a table for each pair below slices/splitting/; return the path of the JSON.

    Where no site has SAEs of two widths, it is left out. Pairs that have a table are not computed again.
    """
    pairs, path = width_pairs(config), config.slices / SLICE
    if not pairs:
        return left_out(path, "no site has SAEs of two widths; train more widths to see how latents split")
    inputs = content_id([pair.inputs for pair in pairs])
    if is_current(path, inputs) and all(pair.is_made for pair in pairs):
        return path
    pending = [pair for pair in pairs if not pair.is_made]
    with meter("splitting", len(pending), "pairs") as progress:
        for start in range(0, len(pending), config.pairs_at_once):
            for _ in _compare(config, pending[start : start + config.pairs_at_once]):
                progress.advance()
    write_slice(
        path, inputs, {"null": config.null, "quantile": config.null_quantile, "pairs": [_summary(config, pair) for pair in pairs]}
    )
    return path


def width_pairs(config: SplittingConfig) -> list[Pair]:
    """At each site, for adjacent widths: the narrow one's canonical SAE and the wide SAE of L0 nearest to its own."""
    scored = read_scored(config.evaluate)
    canonical = canonical_saes(scored, config.canonical_l0)
    found = []
    for site in sorted({one.site for one in scored}):
        for small, large in pairwise(sorted(width for where, width in canonical if where == site)):
            narrow = canonical[site, small]
            wider = [one for one in scored if (one.site, one.width) == (site, large)]
            found.append(_pair(config, narrow, canonical_saes(wider, narrow.l0)[site, large]))
    return found


def _pair(config: SplittingConfig, narrow: Scored, wide: Scored) -> Pair:
    decides = config.model_dump(include={"null", "null_quantile", "null_latents", "seed"})
    inputs = content_id([VERSION, narrow.evidence, wide.evidence, num_sequences(config), decides])
    table = config.slices / FOLDER / narrow.site.folder / f"{_flat(narrow)}__{_flat(wide)}.parquet"
    return Pair(narrow, wide, table, inputs)


def _flat(one: Scored) -> str:
    return one.target.name.replace("/", "_")


def num_sequences(config: SplittingConfig) -> int:
    """Blocks on which firings are counted: no more than the evaluation reads [blocks]."""
    return min(config.num_sequences, config.evaluate.num_sequences)


@dataclass(frozen=True)
class DecoderMatch:
    """What the decoders alone say about a pair."""

    parent: Int64[Tensor, " wide"]
    """The narrow latent nearest to each wide one."""
    cosine: Float[Tensor, " wide"]
    """Their cosine."""
    null_p: Float[Tensor, " wide"]
    """Share of random latents that lie as near to some narrow latent."""
    threshold: float
    """Cosine above which a wide latent is related to its parent."""
    relation: list[str]
    """matched, split or new, for each wide latent."""
    null: dict[str, float]
    """Shares of these relations for a random dictionary in the wide one's place."""


def decoder_match(
    narrow: Float[Tensor, "narrow d_in"], wide: Float[Tensor, "wide d_in"], config: SplittingConfig
) -> DecoderMatch:
    """Compare two decoders. The threshold comes from random latents, the shares of chance from others than these."""
    narrow, wide = normalised_rows(narrow), normalised_rows(wide)
    parent, cosine = nearest(narrow, wide)
    _, chance = null_nearest(narrow, wide, config.null_latents, config.null, 2 * config.seed)
    threshold = float(torch.quantile(chance.double(), config.null_quantile))
    random = null_nearest(narrow, wide, len(wide), config.null, 2 * config.seed + 1)
    null = shares(relations(*random, threshold))
    return DecoderMatch(parent, cosine, p_values(cosine, chance), threshold, relations(parent, cosine, threshold), null)


def _compare(config: SplittingConfig, pairs: Sequence[Pair]) -> Iterable[Pair]:
    """Make the tables of some pairs: decoders first, then firings in one pass over the text for all of them."""
    kin, firings = {}, {}
    for pair in pairs:
        narrow, wide = (one.target.sae().W_dec.to(config.evaluate.model.device) for one in (pair.narrow, pair.wide))
        kin[pair.table] = decoder_match(narrow, wide, config)
        firings[pair.table] = FiringCounts(kin[pair.table].parent, len(narrow))
    targets = {one.target.identity: one.target for pair in pairs for one in (pair.narrow, pair.wide)}
    for codes in codes_of(config.evaluate, list(targets.values()), num_sequences(config)):
        for pair in pairs:
            firings[pair.table].update(codes[pair.narrow.target.identity], codes[pair.wide.target.identity])
    for pair in pairs:
        _write_table(pair, kin[pair.table], firings[pair.table])
        yield pair


def _write_table(pair: Pair, kin: DecoderMatch, firings: FiringCounts) -> None:
    both, narrow, wide = firings.both.numpy(), firings.narrow[firings.parent].numpy(), firings.wide.numpy()
    summary = {
        **shares(kin.relation),
        "null": kin.null,
        "threshold": kin.threshold,
        "same_number": float((kin.parent == torch.arange(len(kin.parent))).double().mean()),
        "cosine_quantiles": {str(q): float(torch.quantile(kin.cosine.double(), q)) for q in QUANTILES},
    }
    table = pyarrow.table(
        {
            "narrow": pyarrow.array(kin.parent.numpy().astype(np.int32)),
            "wide": pyarrow.array(np.arange(len(both), dtype=np.int32)),
            "cosine": pyarrow.array(kin.cosine.numpy().astype(np.float32)),
            "null_p": pyarrow.array(kin.null_p.numpy().astype(np.float32)),
            "cofiring": _share(both, narrow),
            "conditional": _share(both, wide),
            "relation": pyarrow.array(kin.relation),
        }
    ).replace_schema_metadata({INPUTS: pair.inputs, "summary": json.dumps(summary)})
    write_table(pair.table, table, compression="zstd")


def _share(part: np.ndarray, whole: np.ndarray) -> pyarrow.Array:
    """The quotient as float32, null where the whole is 0."""
    return pyarrow.array((part / np.maximum(whole, 1)).astype(np.float32), mask=whole == 0)


def _summary(config: SplittingConfig, pair: Pair) -> dict[str, Any]:
    metadata = pyarrow.parquet.read_schema(pair.table).metadata
    return {
        "site": pair.narrow.site.folder,
        "narrow": pair.narrow.name,
        "wide": pair.wide.name,
        "narrow_l0": pair.narrow.l0,
        "wide_l0": pair.wide.l0,
        **json.loads(metadata[b"summary"]),
        "table": pair.table.relative_to(config.slices).as_posix(),
    }
