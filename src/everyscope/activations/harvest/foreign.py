"""Import: activations stored by other tools, of any model, into one shuffled folder of shards.

The table is read once, in order (once for every 256 shards), and each row goes to its place in a shuffle over all shards that is
computed, not stored. Shards that do not fit in memory together take their rows in the order in which they come and are put
in order one by one. So memory is bounded by `shuffle_bytes`, one piece of the table, and 4 bytes for each row of 256 shards.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from everyscope.activations.harvest.config import ImportConfig
from everyscope.activations.harvest.fill import segment_rows, sync
from everyscope.activations.harvest.locks import clear, writing
from everyscope.activations.harvest.tables import ActivationTable, open_table
from everyscope.activations.shards.format import Layout, activation_layout
from everyscope.activations.shards.manifest import MANIFEST, is_committed, read_manifest, seal_folder, shard_path, sidecar_path
from everyscope.activations.shards.order import scattered
from everyscope.activations.shards.writer import ActivationWriter, new_activation_shard
from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import PARTIAL, read_json, require_free_space, write_json
from everyscope.base.ids import content_id
from everyscope.base.progress import Meter, meter

OWNER = "import.json"
"""The file that says what the folder is being filled with."""
SHARDS_AT_ONCE = 256
"""Shards that one pass over the table fills: each is a stream to the disk."""
MOST_SEQUENCES = 2**31 - 1
"""What the int32 that says from which sequence a row is can count."""


@dataclass(frozen=True)
class ImportResult:
    """What an import has written."""

    folder: Path
    """Where the shards lie."""
    num_rows: int
    """Rows in them [rows]."""
    d_in: int
    """Size of the activations."""


def import_array(config: ImportConfig) -> ImportResult:
    """Import what is missing; resumes at the border of the pass in which it was interrupted.

    DataError and ShapeMismatch where the source is no table of activations; ConfigError where `out` holds something else;
    StorageError where it cannot be written, or the disk is too small; NonFinite, naming sequence and position.
    """
    table = open_table(config)
    work = _Import(config, table)
    work.check_owner()
    if not work.is_sealed():
        purpose = content_id(work.owner)
        with writing(config.out, (0, 1), purpose, lambda has_company: work.check_owner(), work.discard_if_empty):
            work.write()
    clear(config.out)
    return ImportResult(config.out, work.num_rows, table.d_in)


class _Import:
    """One import into one folder."""

    def __init__(self, config: ImportConfig, table: ActivationTable) -> None:
        self.config, self.table = config, table
        self.kept = table.positions - config.skip_positions
        if self.kept < 1 or table.num_sequences > MOST_SEQUENCES:
            raise ShapeMismatch(
                f"{config.source}: {table.num_sequences} sequences of {table.positions} positions, {self.kept} after "
                f"skip_positions; expected at most {MOST_SEQUENCES} sequences and at least one position; cut it, or skip fewer"
            )
        self.num_rows = table.num_sequences * self.kept
        self.owner: dict[str, Any] = {"config": config.record(), "parents": {"source": table.identity}}

    def check_owner(self) -> None:
        """ConfigError where the folder holds shards that are not of this import."""
        out = self.config.out
        if (out / OWNER).is_file() and read_json(out / OWNER) == self.owner:
            return
        if any(out.rglob("shard_*")) or (out / MANIFEST).is_file():
            raise ConfigError(f"{out}: holds other shards, or an import with another config; choose another folder with --out")

    def is_sealed(self) -> bool:
        """Whether the manifest stands, and every file that it names."""
        out = self.config.out
        if not (out / MANIFEST).is_file():
            return False
        return all(is_committed(out / entry.file) for entry in read_manifest(out).shards)

    def discard_if_empty(self) -> None:
        """Where no shard was committed, take away the owner's file."""
        if not any(self.config.out.glob("shard_*")):
            (self.config.out / OWNER).unlink(missing_ok=True)

    def write(self) -> None:
        """All shards that are missing, then the manifest."""
        out, config = self.config.out, self.config
        for path in (*out.glob("*" + PARTIAL), *out.glob("shard_*.safetensors")):
            if path.name.endswith(PARTIAL) or not sidecar_path(path).is_file():
                path.unlink()
        count = -(-self.num_rows // config.bucket_rows)
        missing = [index for index in range(count) if not is_committed(shard_path(out, index))]
        require_free_space(out, sum(self._layout(index).num_bytes for index in missing), "this import")
        write_json(out / OWNER, self.owner)
        if missing:
            (out / MANIFEST).unlink(missing_ok=True)
        passes = [missing[start : start + SHARDS_AT_ONCE] for start in range(0, len(missing), SHARDS_AT_ONCE)]
        with meter("import", self.num_rows * len(passes), "rows") as progress:
            for indices in passes:
                self._write_shards(indices, progress)
        seal_folder(
            out,
            count,
            site=config.site,
            config=config.record(),
            parents=self.owner["parents"],
            version=version("everyscope"),
        )

    def _write_shards(self, indices: list[int], progress: Meter) -> None:
        layouts = {index: self._layout(index) for index in indices}
        segments = segment_rows(list(layouts.values()), self.config.shuffle_bytes)
        with ExitStack() as stack:
            writers = {
                index: stack.enter_context(
                    new_activation_shard(
                        shard_path(self.config.out, index),
                        name=self.config.site,
                        rows=self._rows(index),
                        d_in=self.table.d_in,
                        dtype=self.config.dtype,
                        context=self.table.positions,
                        after={"rows": index * self.config.bucket_rows + self._rows(index)},
                        segment_rows=rows,
                    )
                )
                for index, rows in zip(indices, segments, strict=True)
            }
            first = 0
            for chunk in self.table.chunks(self.table.chunk_sequences):
                self._put(writers, chunk, first)
                first += len(chunk)
                progress.advance(len(chunk) * self.kept)
            sync(list(writers.values()))

    def _put(self, writers: dict[int, ActivationWriter], chunk: Tensor, first: int) -> None:
        """Each row of the sequences from `first` on to its shard, where that is being written."""
        skip, positions = self.config.skip_positions, self.table.positions
        sequence = np.repeat(np.arange(len(chunk)), self.kept)
        position = np.tile(np.arange(skip, positions), len(chunk))
        taken = sequence * positions + position
        places = scattered(first * self.kept + np.arange(len(taken)), self.num_rows, self.config.seed)
        shard = places // self.config.bucket_rows
        order = np.argsort(shard, kind="stable")
        borders = np.flatnonzero(np.diff(shard[order])) + 1
        rows = chunk.flatten(0, 1)
        for part in np.split(order, borders):
            index = int(shard[part[0]])
            if index in writers:
                inside = (places[part] - index * self.config.bucket_rows).astype(np.int32)
                writers[index].put(rows, inside, first + sequence[part], position[part], taken[part])

    def _rows(self, index: int) -> int:
        return min(self.config.bucket_rows, self.num_rows - index * self.config.bucket_rows)

    def _layout(self, index: int) -> Layout:
        return activation_layout(self._rows(index), self.table.d_in, self.config.dtype)
