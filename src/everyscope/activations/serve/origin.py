"""Where a server gets chunks from: shards on its disk, or anything else that can make them."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from everyscope.activations.serve.leases import ChunkKey
from everyscope.activations.shards.bits import carrier_of
from everyscope.activations.shards.format import RowDtype
from everyscope.activations.shards.manifest import MANIFEST, TOKENS, read_manifest
from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.statistics import Statistics
from everyscope.base.errors import DataError


@dataclass(frozen=True)
class SiteFacts:
    """What is fixed about a site before its first row is read."""

    num_rows: int
    """Rows of one epoch, over all slices [rows]."""
    d_in: int
    """Size of the activations."""
    dtype: RowDtype
    """Number format of the rows."""
    identity: str
    """A content id: equal for equal rows in equal order."""
    statistics: Statistics
    """Figures over all rows, or, where a model makes them on demand, over the first bucket's."""
    folder: Path | None
    """Where a client on the same host finds the same rows as shards; None where there are no files."""


class Origin(Protocol):
    """A maker of chunks. `read` is called from the server's reading threads, several at a time if it has several."""

    @property
    def sites(self) -> Mapping[str, SiteFacts]:
        """All sites, by folder name."""
        ...

    def group(self, key: ChunkKey) -> tuple[ChunkKey, ...]:
        """All chunks that come out together with this one, itself included; cheap, and the same at every call.

        One for shards. A language model makes all sites, and all chunks of one shuffled bucket, in one go.
        """
        ...

    def read(self, key: ChunkKey) -> Mapping[ChunkKey, np.ndarray]:
        """The rows of `group(key)`: arrays [rows, d_in] in the carrier type, which stay as they are.

        A chunk's rows are a function of its key, however often and in whatever order chunks are read. Jumps may be costly, so the
        server goes forward where it has the choice. Any EveryscopeError is raised in the readers that wait.
        """
        ...

    def places(self, site: str) -> str:
        """A content id of which token each row of a site is of, equal for sites whose rows belong together. May take long."""
        ...

    def close(self) -> None:
        """No more will be read."""
        ...


class ShardOrigin:
    """Shards on this machine."""

    def __init__(self, root: Path, chunk_rows: int) -> None:
        """All finished sites at or below `root`; DataError where there is none, or one site lies there twice."""
        self._chunk_rows = chunk_rows
        folders = sorted(path.parent for path in root.rglob(MANIFEST))
        self._shards: dict[str, Shards] = {}
        self.sites: dict[str, SiteFacts] = {}
        for folder in folders:
            if read_manifest(folder).site == TOKENS:
                continue
            shards = Shards(folder)
            if shards.site in self.sites:
                raise DataError(f"{folder}: the site {shards.site} lies below {root} twice; serve one of the two folders")
            dtype: RowDtype = "bfloat16" if shards.dtype == "bfloat16" else "float32"
            self._shards[shards.site] = shards
            self.sites[shards.site] = SiteFacts(
                shards.num_rows, shards.d_in, dtype, shards.identity, shards.statistics, folder.resolve()
            )
        if not self.sites:
            raise DataError(f"{root}: holds no finished shards; give a folder that `everyscope harvest` wrote")
        self._locks = {site: threading.Lock() for site in self.sites}

    def group(self, key: ChunkKey) -> tuple[ChunkKey, ...]:
        """The chunk alone."""
        return (key,)

    def read(self, key: ChunkKey) -> Mapping[ChunkKey, np.ndarray]:
        """A copy of the chunk's rows; DamagedData, naming the shard, where they are not what was written."""
        shards, start = self._shards[key.site], key.chunk * self._chunk_rows
        with self._locks[key.site]:
            rows = shards.rows(start, min(start + self._chunk_rows, shards.num_rows))
        return {key: carrier_of(rows)}

    def places(self, site: str) -> str:
        """`Shards.places_identity`."""
        folder = self.sites[site].folder
        assert folder is not None, "shards lie in folders"
        return Shards(folder).places_identity()  # by a reader of its own: chunks are asked for meanwhile

    def close(self) -> None:
        """Nothing to do."""
