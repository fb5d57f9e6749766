"""The best linear map from what transcoders read to what they write: what their latents must add to, to be worth anything.

Least squares on training rows that are usual on both sides, with an intercept. Kept in the scores folder, and made once a site.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from everyscope.activations.shards.reader import Shards
from everyscope.activations.stream.aligned import REMEDY
from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.evaluate.calibration import CHUNK_ROWS, Calibration, calibration_identity
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import Cost, keep_cost
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.capture import capture
from everyscope.sites.model import LanguageModel
from everyscope.sites.names import Site, places_of
from everyscope.text.blocks import read_blocks
from everyscope.text.tokenizer import load_tokenizer

LINEAR_FILE = "linear.safetensors"
LINEAR_VERSION = 1
"""Version in the inputs that a kept file records."""
LEAST_VARIANCE = 1e-9
"""Directions of the inputs with a smaller share of the largest variance are left out: rounding rules there [1]."""


@dataclass(frozen=True)
class LinearMap:
    """y_hat = (x - input_mean) @ weight + target_mean, float64."""

    weight: Float[Tensor, "d_in d_out"]
    input_mean: Float[Tensor, " d_in"]
    target_mean: Float[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """The prediction from raw rows, float64."""
        return (x.double() - self.input_mean) @ self.weight + self.target_mean

    def to(self, device: torch.device) -> "LinearMap":
        """The same on another device."""
        return LinearMap(*(getattr(self, field.name).to(device) for field in fields(self)))


class LinearSums:
    """What least squares needs, row by row, float64."""

    def __init__(self) -> None:
        """No rows yet."""
        self._count, self._shifts, self._totals = 0, (torch.zeros(()), torch.zeros(())), (torch.zeros(()), torch.zeros(()))
        self._inputs, self._products = torch.zeros(()), torch.zeros(())

    def update(self, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"]) -> None:
        """Add rows of both sides, which belong together."""
        if not len(x):
            return
        sides = x.double().cpu(), y.double().cpu()
        if not self._count:  # any vectors near the means will do, so that little cancels
            self._shifts = sides[0].mean(0), sides[1].mean(0)
        x, y = sides[0] - self._shifts[0], sides[1] - self._shifts[1]
        self._count += len(x)
        self._totals = self._totals[0] + x.sum(0), self._totals[1] + y.sum(0)
        self._inputs, self._products = self._inputs + x.T @ x, self._products + x.T @ y

    def finish(self) -> LinearMap:
        """The map of least squared error; DataError where no row came."""
        if not self._count:
            raise DataError("no unmasked token among the training rows of a transcoder's sites; raise calibration_sequences")
        x, y = self._totals[0] / self._count, self._totals[1] / self._count
        covariance = self._inputs / self._count - torch.outer(x, x)
        weight = torch.linalg.pinv(covariance, rtol=LEAST_VARIANCE, hermitian=True) @ (
            self._products / self._count - torch.outer(x, y)
        )
        return LinearMap(weight, self._shifts[0] + x, self._shifts[1] + y)


def usual_pairs(
    x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"], of_input: Calibration, of_target: Calibration
) -> Bool[Tensor, " rows"]:
    """Which rows are massive on neither side."""
    return ~NormLimits(float(of_input.norm_limit), float(of_target.norm_limit)).massive(x, y)


def linear_maps(
    config: EvaluateConfig,
    sites: list[Site],
    calibrations: dict[Site, Calibration],
    language: LanguageModel,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[Site, LinearMap]:
    """The map of each of `sites` that reads one place and writes another; `calibrations` are of places. Forward passes that it
    takes, where there are no shards, go into the scores' cost, and `advance` gets their blocks.
    """
    wanted = [site for site in sites if site.inputs != site.outputs]
    found = {site: kept for site in wanted if (kept := _kept(config, site)) is not None}
    missing = [site for site in wanted if site not in found]
    if not missing:
        return found
    began, sums = time.monotonic(), {site: LinearSums() for site in missing}
    if config.shards is not None:
        for site in missing:
            for x, y in _rows_of_shards(config, config.shards, site):
                _add(sums[site], site, x, y, calibrations)
    else:
        passes = 0
        for rows, count in _rows_of_text(config, missing, language):
            for site in missing:
                _add(sums[site], site, rows[site.inputs[0]], rows[site.outputs[0]], calibrations)
            passes += 1
            advance(count)
        cost = Cost(calibration=passes, seconds=time.monotonic() - began)
        keep_cost(config.out, f"linear {content_id([_source(config, site) for site in missing])}", cost)
    for site in missing:
        made = found[site] = sums[site].finish()
        tensors = {field.name: getattr(made, field.name).contiguous() for field in fields(made)}
        write_tensors(_path(config, site), tensors, {"source": _source(config, site)}, is_sealed=True)
    return found


def _add(sums: LinearSums, site: Site, x: Tensor, y: Tensor, calibrations: dict[Site, Calibration]) -> None:
    usual = usual_pairs(x, y, calibrations[site.inputs[0]], calibrations[site.outputs[0]])
    sums.update(x[usual], y[usual])


def _rows_of_shards(config: EvaluateConfig, folder: Path, site: Site) -> Iterator[tuple[Tensor, Tensor]]:
    sides = [Shards(folder / place.folder) for place in (site.inputs[0], site.outputs[0])]
    num_rows = min(config.pca_rows, sides[0].num_rows)
    if sides[1].num_rows != sides[0].num_rows:
        raise DataError(f"{folder}: {site} has {sides[0].num_rows} rows on one side, {sides[1].num_rows} on the other; {REMEDY}")
    for start in range(0, num_rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, num_rows)
        for column in ("sequence", "position"):
            one, other = (getattr(side, column)(start, stop) for side in sides)
            if not torch.equal(one, other):
                raise DataError(f"{folder}: rows {start} to {stop} of {site} are of other tokens on one side; {REMEDY}")
        yield sides[0].rows(start, stop), sides[1].rows(start, stop)


def _rows_of_text(config: EvaluateConfig, sites: list[Site], language: LanguageModel) -> Iterator[tuple[dict[Site, Tensor], int]]:
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    blocks = islice(read_blocks(config.text, tokenizer, "train"), config.calibration_blocks)
    while batch := list(islice(blocks, config.batch_blocks)):
        mask = torch.from_numpy(np.stack([block.mask for block in batch]))
        input_ids = torch.from_numpy(np.stack([block.input_ids for block in batch])).long()
        found = capture(language.model, places_of(sites), input_ids)
        yield {place: x[mask.to(x.device)] for place, x in found.items()}, len(batch)


def _source(config: EvaluateConfig, site: Site) -> str:
    return f"{calibration_identity(config, site)} linear {LINEAR_VERSION}"


def _path(config: EvaluateConfig, site: Site) -> Path:
    return config.out / site.folder / LINEAR_FILE


def _kept(config: EvaluateConfig, site: Site) -> LinearMap | None:
    """The map on disk, if it was made from the same rows."""
    path = _path(config, site)
    if not path.exists():
        return None
    try:
        with opened_tensors(path) as file:
            if (file.metadata() or {}).get("source") != _source(config, site):
                return None
            return LinearMap(**{field.name: file.get_tensor(field.name) for field in fields(LinearMap)})
    except DataError:
        return None
