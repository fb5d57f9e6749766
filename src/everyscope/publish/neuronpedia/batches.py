"""Files of the bulk layout: gzipped lines, in batches that hold Neuronpedia's limits. Equal rows give equal bytes.

Its importer takes one listing of a folder, which ends after 1,000 names without a word, and reads each file whole into memory.
"""

import gzip
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow

from everyscope.base.errors import DataError
from everyscope.base.files import whole_file

MAX_FILES = 1000
"""Files that a source may have [files]."""
METADATA_FILES = 4
"""Of them, those that are no batches [files]."""
LEVEL = 5
"""Of compression."""
LATENTS_STEP = 256
"""Files begin with latents of which this is a divisor, as row groups do [latents]."""


def latents_per_file(width: int, kinds: int, wanted: int) -> int:
    """How many latents each file holds so that an SAE keeps within MAX_FILES, and at least `wanted` [latents]."""
    files = (MAX_FILES - METADATA_FILES) // kinds
    needed = -(-width // files)
    return wanted if needed <= wanted else -(-needed // LATENTS_STEP) * LATENTS_STEP


class Batches:
    """One folder of batch-0.jsonl.gz, batch-1.jsonl.gz, ...; a file is begun when it gets its first row, so none is empty."""

    def __init__(self, folder: Path, per_file: int, max_bytes: int) -> None:
        """A file holds the rows of `per_file` latents, or fewer where these take more than `max_bytes` unpacked [bytes]."""
        self._folder, self._per_file, self._max_bytes = folder, per_file, max_bytes
        self._stack = ExitStack()
        self._file: gzip.GzipFile | None = None
        self._bucket, self._size = -1, 0
        self.num_rows, self.num_bytes = 0, 0
        self.names: list[str] = []

    def write(self, first_latent: int, rows: pyarrow.Array) -> None:
        """Add rows of latents from `first_latent` on."""
        if first_latent // self._per_file != self._bucket:
            self._close()
            self._bucket = first_latent // self._per_file
        lines = [line + b"\n" for line in rows.cast(pyarrow.binary()).to_pylist()]
        ends = np.cumsum([len(line) for line in lines])
        begin = 0
        while begin < len(lines):
            before = int(ends[begin - 1]) if begin else 0
            end = int(np.searchsorted(ends, self._max_bytes - self._size + before, "right"))
            if end == begin and self._size:
                self._close()
                continue
            if end == begin:
                raise DataError(
                    f"{self._folder}: a row of latent {first_latent} or behind takes {len(lines[begin])} bytes, a file holds "
                    f"{self._max_bytes}; raise --max-file-bytes"
                )
            self._open().write(b"".join(lines[begin:end]))
            self._size += int(ends[end - 1]) - before
            begin = end
        self.num_rows += len(lines)
        self.num_bytes += int(ends[-1]) if len(lines) else 0

    def _open(self) -> gzip.GzipFile:
        if self._file is None:
            name = f"batch-{len(self.names)}.jsonl.gz"
            partial = self._stack.enter_context(whole_file(self._folder / name))
            raw = self._stack.enter_context(partial.open("wb"))
            self._file = self._stack.enter_context(gzip.GzipFile("", "wb", LEVEL, raw, mtime=0))
            self.names.append(name)
        return self._file

    def _close(self) -> None:
        self._stack.close()
        self._file, self._size = None, 0

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)
