"""What an evaluation must know of a site's training activations: which norms are massive, and of all other rows the mean, the
principal components and a few rows.

It comes from the shards that the SAEs were trained on, or, for SAEs made elsewhere, from a pass over training documents of
the text. Never from held-out rows: the baselines are fitted and tested as the SAEs are.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.statistics import Sums
from everyscope.base.errors import DataError, ShapeMismatch
from everyscope.base.ids import content_id
from everyscope.base.progress import say
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import Cost, keep_cost
from everyscope.sae.normalisation import is_massive
from everyscope.sites.capture import capture
from everyscope.sites.model import LanguageModel
from everyscope.sites.names import Site, places_of
from everyscope.text.blocks import Block, read_blocks
from everyscope.text.tokenizer import load_tokenizer

CALIBRATION_FILE = "calibration.safetensors"
CALIBRATION_VERSION = 2
"""Version in the inputs that a kept file records."""
CHUNK_ROWS = 1 << 14
"""Rows read from shards at once [rows]."""
KEPT_ROWS = 2048
"""Training rows that are kept, on which thresholds of random dictionaries are set [rows]."""
LIMIT_ROWS = 4096
"""Where there are no shards, rows whose median norm decides which norms are massive, at least [rows]."""


@dataclass(frozen=True)
class Calibration:
    """A site's training activations in short; massive rows are in none of its figures."""

    mean: Float[Tensor, " d_in"]
    """Mean of the training rows, float64."""
    components: Float[Tensor, "d_in d_in"]
    """Column k is principal component k, in order of falling variance, float64; its largest entry is positive."""
    norm_limit: Float[Tensor, ""]
    """Rows of a larger norm are massive, float64; infinite where none is."""
    rows: Float[Tensor, "rows d_in"]
    """The first KEPT_ROWS training rows, float32."""

    def to(self, device: torch.device) -> "Calibration":
        """The same on another device."""
        return Calibration(*(getattr(self, field.name).to(device) for field in fields(self)))


class CalibrationSums:
    """What a calibration is made of, row by row."""

    def __init__(self, norm_limit: float = math.inf, mean: Float[Tensor, " d_in"] | None = None) -> None:
        """`mean` is that of all usual training rows, where it is known; else that of the rows that come."""
        self._limit, self._known, self._shift = norm_limit, mean, mean
        self._count, self._total, self._outer = 0, torch.zeros(()), torch.zeros(())
        self._rows: list[Tensor] = []

    def update(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Add unmasked training rows, of which massive ones are left out."""
        x = x[~is_massive(x, self._limit)]
        if not len(x):
            return
        exact = x.double()
        if self._shift is None:  # any vector near the mean will do, so that little cancels in the covariance
            self._shift = exact.mean(0)
        if not self._count:
            self._total = torch.zeros_like(exact[0])
            self._outer = self._total.new_zeros(len(self._total), len(self._total))
        shifted = exact - self._shift.to(x.device)
        kept = max(0, KEPT_ROWS - self._count)
        self._count += len(x)
        self._total += shifted.sum(0)
        self._outer += shifted.T @ shifted
        self._rows.append(x[:kept].float().cpu())

    def finish(self) -> Calibration:
        """The calibration; DataError where no row came."""
        if self._shift is None or not self._count:
            raise DataError("no unmasked token among the training documents that were read; raise calibration_sequences")
        shift, offset = self._shift.cpu(), self._total.cpu() / self._count
        _, components = torch.linalg.eigh(self._outer.cpu() / self._count - torch.outer(offset, offset))
        components = components.flip(1)
        peaks = components.abs().argmax(0)
        components = components * components[peaks, torch.arange(len(peaks))].sign()
        mean = shift + offset if self._known is None else self._known
        limit = torch.tensor(self._limit, dtype=torch.float64)
        return Calibration(mean.double(), components.contiguous(), limit, torch.cat(self._rows))


class _TextSums:
    """The same from rows whose norms nobody knows yet: the first LIMIT_ROWS, or all where there are fewer, set the limit."""

    def __init__(self, max_norm: float | None) -> None:
        self._max_norm = max_norm
        self._waiting: list[Tensor] = []
        self._sums: CalibrationSums | None = None

    def update(self, x: Float[Tensor, "rows d_in"]) -> None:
        if self._sums is not None:
            self._sums.update(x)
            return
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= LIMIT_ROWS:
            self._settle()

    def finish(self) -> Calibration:
        return (self._sums or self._settle()).finish()

    def _settle(self) -> CalibrationSums:
        """Set the limit by the rows that wait, and add them."""
        self._sums = CalibrationSums(limit_of(self._waiting, self._max_norm))
        for rows in self._waiting:
            self._sums.update(rows)
        self._waiting = []
        return self._sums


def limit_of(rows: Sequence[Float[Tensor, "rows d_in"]], max_norm: float | None) -> float:
    """The norm above which rows are massive, by `rows` alone; infinite where there is none."""
    count = sum(map(len, rows))
    if max_norm is None or not count:
        return math.inf
    sums = Sums(rows[0].shape[1], context=1)
    for some in rows:
        sums.add(some.float().cpu().numpy(), np.zeros(len(some), np.int64))
    return sums.statistics().norm_limit(max_norm)


def calibration_identity(config: EvaluateConfig, site: Site) -> str:
    """What the calibration of `site` is made from: the shards' identity and rows, or model, text and blocks; and which are left
    out. Of a transcoder's site, of both its places.
    """
    if site.inputs != site.outputs:
        return " ".join(calibration_identity(config, place) for place in places_of([site]))
    version = f"version {CALIBRATION_VERSION} max_norm {config.max_norm}"
    if config.shards is not None:
        return f"shards {Shards(config.shards / site.folder).identity} {config.pca_rows} {version}"
    decides = config.model_dump(mode="json", include={"model", "text", "batch_blocks"})
    return f"text {content_id(decides | {'blocks': config.calibration_blocks})} {site.folder} {version}"


def calibrate(
    config: EvaluateConfig, sites: list[Site], language: LanguageModel, advance: Callable[[int], None] = lambda _: None
) -> dict[Site, Calibration]:
    """The calibrations of `sites`, each of one place; what forward passes they take goes into the scores' cost, and `advance`
    gets their blocks.

    Each is kept in the scores folder and made once. ShapeMismatch where the shards are of another model.
    """
    found = {site: kept for site in sites if (kept := _kept(config, site)) is not None}
    missing = [site for site in sites if site not in found]
    began = time.monotonic()
    if config.shards is not None:
        for site in missing:
            found[site] = _of_shards(Shards(config.shards / site.folder), config)
            _keep(config, site, found[site])
    else:
        made, passes = _of_text(config, missing, language, advance) if missing else ({}, 0)
        if passes:
            cost = Cost(calibration=passes, seconds=time.monotonic() - began)
            keep_cost(config.out, f"calibration {content_id([calibration_identity(config, site) for site in sites])}", cost)
        for site, calibration in made.items():
            _keep(config, site, calibration)
        found |= made
    for site, calibration in found.items():
        if (want := language.adapter.width(site)) != (got := len(calibration.mean)):
            raise ShapeMismatch(f"{site}: the model gives d_in={want}, the shards {got}; do they come from another model?")
    return found


def _path(config: EvaluateConfig, site: Site) -> Path:
    return config.out / site.folder / CALIBRATION_FILE


def _keep(config: EvaluateConfig, site: Site, calibration: Calibration) -> None:
    tensors = {field.name: getattr(calibration, field.name) for field in fields(calibration)}
    write_tensors(_path(config, site), tensors, {"source": calibration_identity(config, site)}, is_sealed=True)


def _kept(config: EvaluateConfig, site: Site) -> Calibration | None:
    """The calibration on disk, if it was made from the same rows."""
    path = _path(config, site)
    if not path.exists():
        return None
    try:
        with opened_tensors(path) as file:
            if (file.metadata() or {}).get("source") != calibration_identity(config, site):
                return None
            return Calibration(**{field.name: file.get_tensor(field.name) for field in fields(Calibration)})
    except DataError:
        say(f"{path} is corrupted; recomputing it")
        return None


def _of_shards(shards: Shards, config: EvaluateConfig) -> Calibration:
    usual = shards.statistics.usual(config.max_norm)
    sums = CalibrationSums(usual.norm_limit, torch.as_tensor(usual.mean, dtype=torch.float64))
    num_rows = min(config.pca_rows, shards.num_rows)
    for start in range(0, num_rows, CHUNK_ROWS):
        sums.update(shards.rows(start, min(start + CHUNK_ROWS, num_rows)))
    return sums.finish()


def _of_text(
    config: EvaluateConfig, sites: list[Site], language: LanguageModel, advance: Callable[[int], None]
) -> tuple[dict[Site, Calibration], int]:
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    blocks = islice(read_blocks(config.text, tokenizer, "train"), config.calibration_blocks)
    sums = {site: _TextSums(config.max_norm) for site in sites}
    passes = 0
    for batch in _batches(blocks, config.batch_blocks):
        input_ids = torch.from_numpy(np.stack([block.input_ids for block in batch])).long()
        mask = torch.from_numpy(np.stack([block.mask for block in batch]))
        for site, activations in capture(language.model, sites, input_ids).items():
            sums[site].update(activations[mask.to(activations.device)])
        passes += 1
        advance(len(batch))
    return {site: site_sums.finish() for site, site_sums in sums.items()}, passes


def _batches(blocks: Iterator[Block], size: int) -> Iterator[list[Block]]:
    while batch := list(islice(blocks, size)):
        yield batch
