"""Where each latent fires and how strongly: collected in one pass of the model over all blocks, for as many SAEs as fit.

Everything else is computed from these codes, so it is exact, and no number depends on how blocks were batched. They lie in
files of some batches each, so that a killed run resumes after the last one, and are deleted when they have been described.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from everyscope.base.errors import DataError
from everyscope.base.files import make_folder, read_json, write_json
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.describe.config import DescribeConfig
from everyscope.describe.kernels import append_latents
from everyscope.describe.sequences import Sequences
from everyscope.describe.targets import DescribeTarget
from everyscope.sae.firings import firings_by_latent
from everyscope.sae.folded import Sae
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.capture import capture
from everyscope.sites.names import places_of

CHUNK_ACTIVATIONS = 1 << 24
"""Latent activations held at once [numbers]; bounds memory at large widths."""
FIRING_BYTES = 8
"""What a firing takes on disk: its place and its strength [bytes]."""
GROUP_FILE = "group.json"
"""Which SAEs the codes in a folder are of."""
REMEDY = "delete it and run `everyscope describe` again"


@dataclass(frozen=True, eq=False)
class LatentCodes:
    """The firings of one SAE, latent after latent, and each latent's in order of place."""

    starts: Int64[np.ndarray, " d_sae_plus_1"]
    """Where each latent's firings begin; the last entry is their number."""
    places: Int32[np.ndarray, " firings"]
    """block * ctx + position."""
    values: Float32[np.ndarray, " firings"]
    """Activations in raw units, > 0."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.starts) - 1

    @property
    def firings(self) -> Int64[np.ndarray, " d_sae"]:
        """Tokens on which each latent fires [tokens]."""
        return np.diff(self.starts)


def joined(parts: Sequence[LatentCodes]) -> LatentCodes:
    """The codes of one SAE from those of consecutive stretches of places."""
    counts = np.sum([part.firings for part in parts], axis=0)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    places, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    filled = starts[:-1].copy()
    for part in parts:
        append_latents(part.starts, part.places, part.values, filled, places, values)
    return LatentCodes(starts, places, values)


@torch.no_grad()
def encode_rows(sae: Sae, rows: Float[Tensor, "n d_in"], places: Int64[np.ndarray, " n"]) -> LatentCodes:
    """The codes of some rows that stand at `places`, which ascend; NonFinite where an activation is NaN or infinite."""
    chunk = max(1, CHUNK_ACTIVATIONS // sae.d_sae)
    parts = []
    for start in range(0, len(rows), chunk):
        found = firings_by_latent(sae, rows[start : start + chunk].to(sae.W_enc.device))
        parts.append(LatentCodes(found.starts, places[start + found.rows].astype(np.int32), found.values))
    if not parts:
        return LatentCodes(np.zeros(sae.d_sae + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    return parts[0] if len(parts) == 1 else joined(parts)


@dataclass(frozen=True)
class CodesFolder:
    """The codes of a group of SAEs on disk, in files of `portion_blocks` blocks each."""

    path: Path
    group: tuple[str, ...]
    """Identities of the SAEs, in order."""
    num_portions: int

    def portion(self, number: int) -> Path:
        """The file of one stretch of blocks."""
        return self.path / f"portion_{number:05d}.safetensors"

    def open(self) -> None:
        """Make the folder ours: files of other SAEs are deleted, files of ours are kept."""
        if unfinished_group(self.path) != self.group:
            self.delete()
            make_folder(self.path)
            write_json(self.path / GROUP_FILE, list(self.group))

    def delete(self) -> None:
        """Take the codes away; they are described, or of no use."""
        shutil.rmtree(self.path, ignore_errors=True)

    def read(self, identity: str) -> LatentCodes:
        """All codes of one SAE, in memory; DamagedData where a file is not what was written."""
        return joined([LatentCodes(*fields) for fields in self._tensors(identity, "starts", "places", "values")])

    def massive(self, identity: str) -> Int32[np.ndarray, " tokens"]:
        """The places whose activation is massive at the SAE's site, ascending; raises as `read`."""
        return np.concatenate([places for (places,) in self._tensors(identity, "massive")])

    def _tensors(self, identity: str, *fields: str) -> Iterator[list[np.ndarray]]:
        """What each portion holds of one SAE."""
        name = self.group.index(identity)
        for number in range(self.num_portions):
            path = self.portion(number)
            with opened_tensors(path, "np", remedy=REMEDY) as file:
                yield [file.get_tensor(f"{name}.{field}") for field in fields]


def unfinished_group(path: Path) -> tuple[str, ...]:
    """The identities of the SAEs whose codes lie in a folder; none where there are no codes."""
    try:
        return tuple(map(str, read_json(path / GROUP_FILE)))
    except (DataError, TypeError):
        return ()


def collect(
    config: DescribeConfig,
    model: Any,
    sequences: Sequences,
    saes: Sequence[tuple[DescribeTarget, Sae]],
    folder: CodesFolder,
    passed: Callable[[int, bool], None],
    pool: ThreadPoolExecutor,
) -> None:
    """Write the portions that are missing; `passed` is called with tokens, and whether an earlier run had passed them.

    The threads of `pool` share the SAEs of a batch.
    """
    size = config.portion_blocks
    for number in range(folder.num_portions):
        blocks = range(number * size, min((number + 1) * size, len(sequences.input_ids)))
        num_tokens = int(sequences.mask[blocks.start : blocks.stop].sum())
        if folder.portion(number).exists():
            passed(num_tokens, True)
            continue
        parts: list[list[LatentCodes]] = [[] for _ in saes]
        massive: list[list[np.ndarray]] = [[] for _ in saes]
        for rows in _batches(config, model, sequences, blocks, [target for target, _ in saes]):
            encoded = pool.map(_encoded, [rows] * len(saes), *zip(*saes, strict=True))
            for part, places, (codes, left_out) in zip(parts, massive, encoded, strict=True):
                part.append(codes)
                places.append(left_out)
            passed(len(rows.places), False)
        tensors = {}
        for name, (part, places) in enumerate(zip(parts, massive, strict=True)):
            codes = joined(part)
            tensors |= {f"{name}.{field}": torch.from_numpy(getattr(codes, field)) for field in ("starts", "places", "values")}
            tensors[f"{name}.massive"] = torch.from_numpy(np.concatenate(places))
        write_tensors(folder.portion(number), tensors, is_sealed=True)


def _encoded(rows: "_Rows", target: DescribeTarget, sae: Sae) -> tuple[LatentCodes, Int32[np.ndarray, " massive"]]:
    """The codes of an SAE on usual rows, and the places of massive ones."""
    read, written = (rows.activations[place.folder] for place in (target.site.inputs[0], target.site.outputs[0]))
    massive = NormLimits(target.input_limit, target.norm_limit).massive(read, written)
    usual = ~massive.cpu().numpy()
    return encode_rows(sae, read[~massive], rows.places[usual]), rows.places[~usual].astype(np.int32)


@dataclass(frozen=True)
class _Rows:
    activations: dict[str, Float[Tensor, "n d_in"]]
    places: Int64[np.ndarray, " n"]


def _batches(
    config: DescribeConfig, model: Any, sequences: Sequences, blocks: range, targets: Sequence[DescribeTarget]
) -> Iterator[_Rows]:
    """The unmasked rows of each place that SAEs of some blocks read or write, a batch at a time."""
    sites = sorted(places_of(target.site for target in targets))
    for start in range(blocks.start, blocks.stop, config.batch_blocks):
        batch = slice(start, min(start + config.batch_blocks, blocks.stop))
        mask = torch.from_numpy(sequences.mask[batch])
        found = capture(model, sites, torch.from_numpy(sequences.input_ids[batch]).long())
        places = np.flatnonzero(sequences.mask[batch].ravel()) + start * sequences.context
        yield _Rows({site.folder: x[mask.to(x.device)] for site, x in found.items()}, places)
