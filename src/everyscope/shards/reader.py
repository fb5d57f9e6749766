"""Reading finished shards by mapping them, with each block's checksum tested the first time this process touches it.

Nothing that fails its checksum is ever returned. Many processes that read one folder share the page cache.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.base.errors import DamagedData, DataError, ShapeMismatch
from everyscope.base.files import read_json, sha256
from everyscope.base.ids import content_id
from everyscope.shards.bits import empty
from everyscope.shards.checksums import BLOCK_BYTES, block_checksum
from everyscope.shards.format import Layout, open_shard
from everyscope.shards.manifest import STATISTICS, TOKENS, Manifest, ShardRecord, read_manifest, read_sidecar, sidecar_path
from everyscope.shards.statistics import Statistics

OPEN_SHARDS = 16
"""Shards kept mapped at once, for each holds a file descriptor; reading goes in order, so more would idle."""


class _OpenShard:
    """One mapped shard, and which of its blocks are still to be checked."""

    def __init__(self, path: Path, record: ShardRecord) -> None:
        self._path, self._record = path, record
        self._layout: Layout = record.layout
        self._raw = open_shard(path, self._layout)
        self._views = self._layout.views(self._raw)
        self._is_checked = np.zeros(len(record.xxh3), bool)

    def copy_rows(self, name: str, start: int, stop: int, into: np.ndarray) -> None:
        """Copy rows `start` to `stop` of tensor `name`; DamagedData, naming file and block, on a wrong checksum."""
        first, last = self._layout.byte_range(name, start, stop)
        for block in range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)):
            if not self._is_checked[block]:
                self._check(block)
        into[:] = self._views[name][start:stop]

    def _check(self, block: int) -> None:
        if block_checksum(self._raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].data) != self._record.xxh3[block]:
            raise DamagedData(
                f"{self._path}: block {block} of 4 MiB differs from its checksum; delete the file and run the same harvest again"
            )
        self._is_checked[block] = True


class ShardFiles:
    """The shards of one folder, whatever they hold, as one long table."""

    def __init__(self, folder: Path) -> None:
        """Open a finished folder; DataError where it has not been finished."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._starts = np.cumsum([0, *(entry.rows for entry in self.manifest.shards)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, name: str, start: int, stop: int, *row_shape: int) -> Tensor:
        """A copy of rows `start` to `stop` (excluded) of tensor `name`, whose rows have `row_shape`; in the stored dtype."""
        if not 0 <= start <= stop <= self.manifest.num_rows:
            raise ShapeMismatch(f"{self.folder}: rows {start} to {stop} were asked for, it holds {self.manifest.num_rows}")
        rows, window = empty((stop - start, *row_shape), self.manifest.dtype if name == "activations" else "int32")
        done = start
        while done < stop:
            shard = int(np.searchsorted(self._starts, done, side="right")) - 1
            end = min(stop, int(self._starts[shard + 1]))
            offset = int(self._starts[shard])
            self._shard(shard).copy_rows(name, done - offset, end - offset, window[done - start : end - start])
            done = end
        return rows

    def _shard(self, index: int) -> _OpenShard:
        if index not in self._open:
            entry = self.manifest.shards[index]
            path = self.folder / entry.file
            if not sidecar_path(path).is_file() or sha256(sidecar_path(path)) != entry.sidecar_sha256:
                raise DamagedData(f"{sidecar_path(path)}: missing, or differs from its checksum; delete {path} and harvest again")
            self._open[index] = _OpenShard(path, read_sidecar(path))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


class Shards:
    """The activations of one site, in their shuffled order."""

    def __init__(self, folder: Path) -> None:
        """Open a finished site folder; DataError where it has not been finished, or holds tokens."""
        self._files = ShardFiles(folder)
        if self._files.manifest.site == TOKENS:
            raise DataError(f"{folder}: holds tokens, expected activations; give a site's folder, as in resid_post/layer_3")

    @property
    def site(self) -> str:
        """The site's folder name, as in resid_post/layer_3."""
        return self._files.manifest.site

    @property
    def d_in(self) -> int:
        """Size of the activations."""
        return self._files.manifest.d_in

    @property
    def num_rows(self) -> int:
        """Rows in all shards [rows]."""
        return self._files.manifest.num_rows

    @property
    def dtype(self) -> str:
        """Stored number format: float32 or bfloat16."""
        return self._files.manifest.dtype

    @property
    def manifest(self) -> Manifest:
        """The folder's manifest, with the harvest's config and parents."""
        return self._files.manifest

    @property
    def identity(self) -> str:
        """The content id of the manifest, and with it of every byte of the shards."""
        return content_id(self._files.manifest.as_json())

    @property
    def statistics(self) -> Statistics:
        """Figures over all rows, from statistics.json."""
        return read_statistics(self._files.folder)

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """A copy of rows `start` to `stop` (excluded), in the stored dtype; ShapeMismatch beyond the end, DamagedData."""
        return self._files.read("activations", start, stop, self.d_in)

    def sequence(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Which block of the harvest each row is from, int32: its row in the tokens' shards."""
        return self._files.read("sequence", start, stop)

    def position(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Where in its block each row is from, int32; BOS would be 0."""
        return self._files.read("position", start, stop)


class Tokens:
    """The blocks of token ids that a harvest read, in reading order."""

    def __init__(self, folder: Path) -> None:
        """Open a finished tokens folder; DataError where it has not been finished, or holds activations."""
        self._files = ShardFiles(folder)
        if self._files.manifest.site != TOKENS:
            raise DataError(f"{folder}: holds activations, expected tokens; give the folder {TOKENS} of a harvest")

    @property
    def num_blocks(self) -> int:
        """Blocks in all shards [blocks]."""
        return self._files.manifest.num_rows

    @property
    def context(self) -> int:
        """Block length [tokens]."""
        return self._files.manifest.d_in

    def input_ids(self, start: int, stop: int) -> Int[Tensor, "blocks ctx"]:
        """A copy of blocks `start` to `stop` (excluded), int32; DamagedData, ShapeMismatch beyond the end."""
        return self._files.read("input_ids", start, stop, self.context)


def read_statistics(folder: Path) -> Statistics:
    """The statistics of a finished site folder; DataError where they are missing or damaged."""
    value = read_json(folder / STATISTICS)
    try:
        return Statistics(
            count=value["count"],
            mean=np.array(value["mean"], np.float64),
            mean_squared_norm=value["mean_squared_norm"],
            position_count=np.array(value["position_count"], np.int64),
            position_mean_squared_norm=np.array(value["position_mean_squared_norm"], np.float64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / STATISTICS}: not the statistics of a site ({error}); run the same harvest again") from error
