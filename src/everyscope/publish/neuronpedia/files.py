"""Files of an export: batches of gzipped lines for the bulk layout, and bodies for the upload API. Equal rows give equal bytes.

Neuronpedia's importer takes one listing of a folder, which ends after 1,000 names without a word, and reads each file whole into
memory. Its API takes at most 128 features and so many bytes at once, and of those only latents that have an example.
"""

import gzip
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from everyscope.base.errors import DataError
from everyscope.base.files import whole_file
from everyscope.publish.json_text import encoded
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.names import NeuronpediaSource

MAX_FILES = 1000
"""Files that a source may have [files]."""
METADATA_FILES = 4
"""Of them, those that are no batches [files]."""
LEVEL = 5
"""Of compression."""
LATENTS_STEP = 256
"""Files that must hold more latents than asked for hold a multiple of this, as row groups do [latents]."""
MAX_FEATURES = 128
"""Features that a body may have [features]."""
MAX_INDEX = 10_000_000
"""The largest number that a latent may have in the API."""


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

    def write(self, latent: int, rows: Sequence[str]) -> None:
        """Add the rows of a latent."""
        if latent // self._per_file != self._bucket:
            self._close()
            self._bucket = latent // self._per_file
        lines = [row.encode() + b"\n" for row in rows]
        if max(map(len, lines), default=0) > self._max_bytes:
            raise DataError(
                f"{self._folder}: a row of latent {latent} takes {max(map(len, lines))} bytes, a file holds {self._max_bytes}; "
                "raise --max-file-bytes"
            )
        pieces = [b"".join(lines)] if self._size + sum(map(len, lines)) <= self._max_bytes else lines
        for piece in filter(None, pieces):
            if self._size + len(piece) > self._max_bytes:
                self._close()
            self._open().write(piece)
            self._size += len(piece)
        self.num_rows, self.num_bytes = self.num_rows + len(lines), self.num_bytes + sum(map(len, lines))

    def _open(self) -> gzip.GzipFile:
        if self._file is None:
            name = f"batch-{len(self.names)}.jsonl.gz"
            raw = self._stack.enter_context(self._stack.enter_context(whole_file(self._folder / name)).open("wb"))
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


@dataclass(frozen=True)
class Body:
    """One body on disk."""

    path: str
    """Below the folder of the export."""
    sha256: str
    num_bytes: int
    num_features: int
    first: int
    """The number of its first latent."""


class Bodies:
    """The bodies of one source, written as they become full."""

    def __init__(self, out: Path, source: NeuronpediaSource, config: NeuronpediaConfig) -> None:
        """Files go below `out`, into upload/<model>/<source>/."""
        self._out, self._folder = out, f"upload/{source.model_id}/{source.id}"
        self._end = f'],"modelId":{encoded(source.model_id)},"source":{encoded(source.id)}}}'.encode()
        self._limit = config.max_body_bytes - len(b'{"features":[') - len(self._end)
        self._waiting: list[bytes] = []
        self._first, self._size = 0, 0
        self.written: list[Body] = []

    def add(self, latent: int, feature: str) -> None:
        """Take the feature of a latent; DataError for one that the API cannot take."""
        content = feature.encode()
        if latent > MAX_INDEX or len(content) > self._limit:
            raise DataError(
                f"{self._folder}: latent {latent} takes {len(content)} bytes, a body holds {self._limit} and latents up to "
                f"{MAX_INDEX}; raise --max-body-bytes"
            )
        if len(self._waiting) == MAX_FEATURES or self._size + len(content) + 1 > self._limit:
            self.flush()
        if not self._waiting:
            self._first = latent
        self._waiting.append(content)
        self._size += len(content) + 1

    def flush(self) -> None:
        """Write what is waiting, if anything is."""
        if not self._waiting:
            return
        path = f"{self._folder}/batch-{len(self.written):05d}.json"
        content = b'{"features":[' + b",".join(self._waiting) + self._end
        with whole_file(self._out / path) as partial:
            partial.write_bytes(content)
        self.written.append(Body(path, hashlib.sha256(content).hexdigest(), len(content), len(self._waiting), self._first))
        self._waiting, self._size = [], 0
