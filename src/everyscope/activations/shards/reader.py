"""Reading finished shards, with each block's checksum tested the first time this process touches it.

Nothing that fails its checksum is ever returned. A folder lies on this machine, or anywhere that an address names
(`open_shards`); both read alike. Several threads may read from one folder at once.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from everyscope.activations.shards.bits import TORCH_DTYPE, reading_tensor
from everyscope.activations.shards.checksums import BLOCK_BYTES
from everyscope.activations.shards.format import Layout, TensorDtype
from everyscope.activations.shards.manifest import (
    MANIFEST,
    STATISTICS,
    TOKENS,
    Manifest,
    ShardRecord,
    merged_sums,
    parse_manifest,
    parse_sidecar,
    sidecar_path,
)
from everyscope.activations.shards.opened import Folder, LocalFolder, OpenShard
from everyscope.activations.shards.remote import is_address, remote_folder
from everyscope.activations.shards.statistics import Statistics, StatisticsRecord
from everyscope.base.errors import DamagedData, DataError, EveryscopeError, ShapeMismatch
from everyscope.base.files import parse_json

OPEN_SHARDS = 16
"""Shards kept mapped at once, for each holds a file descriptor; reading goes in order, so more would idle."""


class ShardFiles:
    """The shards of one folder, whatever they hold, as one long table."""

    def __init__(self, folder: Path | Folder) -> None:
        """Open a finished folder; DataError where it has not been finished."""
        self.folder: Folder = LocalFolder(folder) if isinstance(folder, Path) else folder
        self.location = self.folder.location
        self.manifest: Manifest = parse_manifest(self.folder.read(MANIFEST), f"{self.location}/{MANIFEST}")
        self._starts = np.cumsum([0, *(entry.rows for entry in self.manifest.shards)])
        self._open: OrderedDict[int, tuple[OpenShard, Layout]] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead: ThreadPoolExecutor | None = None
        self._pending: dict[tuple[int, int], Future[None]] = {}

    def read(self, name: str, start: int, stop: int, *row_shape: int) -> Tensor:
        """A copy of rows `start` to `stop` (excluded) of tensor `name`, whose rows have `row_shape`; in the stored dtype."""
        self._check_range(start, stop)
        rows = torch.empty((stop - start, *row_shape), dtype=TORCH_DTYPE[self._dtype(name)])
        self.read_into(name, start, stop, rows)
        return rows

    def read_into(self, name: str, start: int, stop: int, rows: Tensor) -> None:
        """Copy rows `start` to `stop` of tensor `name` into `rows`, of any dtype, on the way: one pass over the bytes.

        It goes by pieces of about a block, so that what has just been checked is still in the processor's cache.
        """
        self._check_range(start, stop)
        dtype, done = self._dtype(name), 0
        for shard, first, last in self._stretches(start, stop):
            opened, layout = self._shard(shard)
            row_bytes = layout.row_bytes(name)
            step = max(1, BLOCK_BYTES // row_bytes)
            for at in range(first, last, step):
                count = min(step, last - at)
                window = opened.window(*layout.byte_range(name, at, at + count))
                rows[done : done + count].copy_(reading_tensor(window, dtype, (count, *rows.shape[1:])))
                done += count

    def prepare(self, name: str, start: int, stop: int) -> None:
        """Begin, in the background, to fetch and check what a reading of these rows will touch. Errors wait for that reading."""
        self._check_range(start, stop)
        with self._lock:
            self._pending = {key: future for key, future in self._pending.items() if not future.done()}
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(self.folder.num_readers, thread_name_prefix="shards-ahead")
            for shard, first, last in self._stretches(start, stop):
                begin, end = self._layout(shard).byte_range(name, first, last)
                file = self.manifest.shards[shard].file
                for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
                    if (shard, block) not in self._pending and not self.folder.is_near(file, block):
                        self._pending[shard, block] = self._ahead.submit(self._fetch, shard, block)

    def statistics(self) -> Statistics:
        """Figures over all rows: from statistics.json, or from the sidecars while that belongs to another manifest.

        Such a file is one that a harvest has just replaced, or a damaged one; the manifest that was opened stays true.
        """
        name = f"{self.location}/{STATISTICS}"
        try:
            data = self.folder.read(STATISTICS)
            if hashlib.sha256(data).hexdigest() == self.manifest.statistics_sha256:
                return Statistics.of_record(StatisticsRecord.model_validate(parse_json(data, name)))
        except (DataError, ValidationError):
            pass
        sums = merged_sums(self._record(shard) for shard in range(len(self.manifest.shards)))
        if sums is None:
            raise DataError(f"{self.location}: tokens have no statistics; give a site's folder, as in resid_post/layer_3")
        return sums.statistics()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.manifest.num_rows:
            raise ShapeMismatch(f"{self.location}: rows {start} to {stop} were asked for, it holds {self.manifest.num_rows}")

    def _dtype(self, name: str) -> TensorDtype:
        return self.manifest.dtype if name == "activations" else "int32"

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) for each shard that holds some of the rows; `first` and `last` count within it."""
        while start < stop:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            offset, end = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            yield shard, start - offset, end - offset
            start = end

    def _layout(self, shard: int) -> Layout:
        return self.manifest.layout(self.manifest.shards[shard].rows)

    def _record(self, shard: int) -> ShardRecord:
        entry = self.manifest.shards[shard]
        sidecar = sidecar_path(Path(entry.file)).name
        name = f"{self.location}/{sidecar}"
        try:
            data = self.folder.read(sidecar)
        except DataError as error:
            raise DamagedData(f"{name}: the sidecar is missing or unreadable; run the same harvest again") from error
        return parse_sidecar(data, entry, self.manifest, name)

    def _shard(self, index: int) -> tuple[OpenShard, Layout]:
        with self._lock:
            if index not in self._open:
                record = self._record(index)
                self._open[index] = self.folder.open(record), record.layout
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(index)
            return self._open[index]

    def _fetch(self, shard: int, block: int) -> None:
        try:
            self._shard(shard)[0].fetch(block)
        except EveryscopeError:
            return  # the block's reader meets the same error and can report it


PLACES_AT_ONCE = 1 << 20
"""Rows whose places are read at a time [rows]."""


class Shards:
    """The activations of one site, in their shuffled order."""

    def __init__(self, folder: Path | Folder) -> None:
        """Open a finished site folder; DataError where it has not been finished, or holds tokens."""
        self._files = ShardFiles(folder)
        if self._files.manifest.site == TOKENS:
            location = self._files.location
            raise DataError(f"{location}: holds tokens, expected activations; give a site's folder, as in resid_post/layer_3")

    @property
    def location(self) -> str:
        """The folder's path or address."""
        return self._files.location

    @property
    def site(self) -> str:
        """The site's folder name, as in resid_post/layer_3, or the free name of what was imported."""
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
        return self._files.manifest.identity

    @property
    def statistics(self) -> Statistics:
        """Figures over all rows of this manifest."""
        return self._files.statistics()

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """A copy of rows `start` to `stop` (excluded), in the stored dtype; ShapeMismatch beyond the end, DamagedData."""
        return self._files.read("activations", start, stop, self.d_in)

    def rows_into(self, start: int, stop: int, rows: Float[Tensor, "rows d_in"]) -> None:
        """Copy rows `start` to `stop` into `rows`, converted to its dtype on the way. Raises as `rows` does."""
        if tuple(rows.shape) != (stop - start, self.d_in):
            raise ShapeMismatch(f"rows of shape {tuple(rows.shape)} to fill, expected ({stop - start}, {self.d_in})")
        self._files.read_into("activations", start, stop, rows)

    def prepare(self, start: int, stop: int) -> None:
        """Begin to fetch and check these rows in the background; ShapeMismatch beyond the end, no other error."""
        self._files.prepare("activations", start, stop)

    def sequence(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Which block of the harvest each row is from, int32: its row in the tokens' shards."""
        return self._files.read("sequence", start, stop)

    def position(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Where in its block each row is from, int32; BOS would be 0."""
        return self._files.read("position", start, stop)

    def places_identity(self) -> str:
        """A content id of which token each row is of, in order; equal for sites whose rows belong together. 8 bytes a row."""
        digest = hashlib.sha256()
        for start in range(0, self.num_rows, PLACES_AT_ONCE):
            stop = min(start + PLACES_AT_ONCE, self.num_rows)
            for read in (self.sequence, self.position):
                digest.update(read(start, stop).numpy().data)
        return digest.hexdigest()


class TokenBlocks:
    """The blocks of token ids that a harvest read, in reading order."""

    def __init__(self, folder: Path | Folder) -> None:
        """Open a finished tokens folder; DataError where it has not been finished, or holds activations."""
        self._files = ShardFiles(folder)
        if self._files.manifest.site != TOKENS:
            raise DataError(f"{self._files.location}: holds activations, expected tokens; give the folder {TOKENS} of a harvest")

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


def open_shards(location: str | Path) -> Shards:
    """The shards of a site, by path or by address: s3://, gs://, http(s)://, memory:// and whatever else fsspec knows.

    DataError where the folder has not been finished; MissingExtra for an address whose package is not installed; StorageError,
    after a time limit, where it does not answer.
    """
    return Shards(shard_folder(location))


def shard_folder(location: str | Path) -> Path | Folder:
    """What `Shards` and `TokenBlocks` open, by path or by address."""
    if isinstance(location, Path):
        return location
    if location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    return remote_folder(location) if is_address(location) else Path(location)
