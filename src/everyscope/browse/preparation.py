"""From a suite's folder to its index, part by part: those that pages ask for first, and all others behind them."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from everyscope.base.errors import DataError, EveryscopeError, first_line
from everyscope.base.progress import meter
from everyscope.base.table_trial import Tried
from everyscope.browse.build import Advance, build_sae, build_text, sae_files, text_files
from everyscope.browse.cache import ensure, part_path, remove_stale, suite_cache
from everyscope.browse.latent_rows import REMEDY
from everyscope.browse.parts import PATIENCE, TEXT, Preparing
from everyscope.browse.queries import DAMAGED_INDEX, Index
from everyscope.circuits.files import FOLDER, graphs_in
from everyscope.suite.layout import INDEX_FILE, suite_folder
from everyscope.suite.records import SuiteIndex, read_index

BATCH_BYTES, BATCH_PARTS = 1 << 24, 8
"""Tables that one process tries before they are indexed [bytes, parts]; starting it takes a quarter of a second."""


def read_suite(path: Path) -> tuple[Path, SuiteIndex]:
    """The folder of the suite in `path` and its suite.json; ConfigError or DataError where it is none that can be browsed."""
    suite = suite_folder(path)
    index = read_index(suite)
    if not index.saes:
        raise DataError(f"{suite / INDEX_FILE}: lists no SAE; publish the suite again")
    return suite, index


@dataclass(eq=False)
class Part:
    """One part of an index."""

    number: int
    path: Path
    """Its database."""
    files: list[Path]
    """What that is made of."""
    done: int = 0
    """Latents that are in [latents]."""
    ready: threading.Event = field(default_factory=threading.Event)


class Preparation:
    """An index that is being made ready: what a page needs is built before the rest, in a thread of its own."""

    def __init__(self, suite: Path, cache: Path | None) -> None:
        """Reads suite.json, which is quick, so that a folder that is no suite is refused at once; raises as `read_suite`."""
        self.suite, self._record = read_suite(suite)
        self.title = self._record.title
        self.index = Index(self.suite, self._record, self)
        self.error = ""
        self._cache = folder = suite_cache(self.suite, cache)
        files = text_files(self.suite)
        self._parts = {TEXT: Part(TEXT, part_path(folder, "text", {}, files), files)}
        for number, sae in enumerate(self._record.saes):
            files = sae_files(self.suite, sae)
            state = {"folder": sae.folder, "width": sae.width}
            self._parts[number] = Part(number, part_path(folder, "sae", state, files), files)
        self._total = sum(sae.width for sae in self._record.saes)
        self._wanted: deque[int] = deque()
        self._helper: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def share(self) -> float:
        """How much of the index is built [1]."""
        return min(1.0, sum(part.done for part in self._parts.values()) / max(1, self._total))

    def share_of(self, number: int) -> float:
        """How much of a part is built [1]; for the text 0 until it is there."""
        part = self._parts[number]
        width = 1 if number == TEXT else self._record.saes[number].width
        return 1.0 if part.ready.is_set() else min(0.99, part.done / width)

    def is_ready(self, number: int) -> bool:
        """Whether a part is built."""
        return self._parts[number].ready.is_set()

    @property
    def graphs(self) -> dict[str, Path]:
        """The suite's attribution graphs by name: those beside it, and those that pages made of a read-only suite; of two the
        younger.
        """
        found = [graphs_in(self.suite), graphs_in(self._cache)]
        return {
            name: max((paths[name] for paths in found if name in paths), key=lambda path: path.stat().st_mtime)
            for name in sorted({*found[0], *found[1]})
        }

    @property
    def new_graphs(self) -> Path:
        """Folder of the graphs that pages make: the suite's own, or where that cannot be written one beside the index."""
        beside = self.suite / FOLDER
        return beside if os.access(beside if beside.is_dir() else self.suite, os.W_OK) else self._cache / FOLDER

    @property
    def is_built(self) -> bool:
        """Whether an earlier run has left the whole index."""
        return all(part.path.exists() for part in self._parts.values())

    def run(self) -> Index:
        """Build what is missing or damaged, and open all of it; StorageError where it cannot be written."""
        with meter("index", self._total, "latents") as progress:
            for batch in self._batches():
                tables = self._tried(batch)
                for part in batch:
                    self._make(part, tables, progress.advance)
        remove_stale([part.path for part in self._parts.values()])
        return self.index

    def start(self) -> threading.Thread:
        """Do that in a thread; an error is kept for the pages."""
        thread = threading.Thread(target=self._guarded, args=(self.run,), name="index", daemon=True)
        thread.start()
        return thread

    def require(self, number: int, seconds: float = PATIENCE) -> Path:
        """See Parts."""
        part = self._parts[number]
        if not part.ready.is_set():
            self.wish(number)
            if not part.ready.wait(seconds):
                raise Preparing(number)
        return part.path

    def wish(self, number: int) -> None:
        """See Parts."""
        with self._lock:
            if self._parts[number].ready.is_set():
                return
            if number not in self._wanted:
                self._wanted.append(number)
            if self._helper is None:
                self.error = ""  # of an attempt before: a disk may have room again
                self._helper = threading.Thread(target=self._guarded, args=(self._fulfil,), name="wanted", daemon=True)
                self._helper.start()

    def forget(self) -> None:
        """Take a damaged index away: what pages ask for is built again."""
        for part in self._parts.values():
            part.path.unlink(missing_ok=True)
            part.ready.clear()
            part.done = 0
        self.index.forget()

    def _fulfil(self) -> None:
        """Make what pages want, the latest wish first, until nothing is left."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._helper = None
                    return
                part = self._parts[self._wanted.pop()]
            try:
                if not part.ready.is_set():
                    self._make(part, self._tried([part]), lambda count: None)
            except BaseException:
                self._helper = None  # the next wish starts another
                raise

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except EveryscopeError as error:
            self.error = str(error)
        except Exception as error:  # whatever it is, the pages must not say "preparing" for ever
            self.error = f"an internal error, or too little memory ({type(error).__name__}: {first_line(error)[:200]})"

    def _batches(self) -> Iterator[list[Part]]:
        """The parts that are not ready, a few at a time."""
        batch: list[Part] = []
        size = 0
        for part in self._parts.values():
            if part.ready.is_set():
                continue
            batch.append(part)
            size += 0 if part.path.exists() else sum(file.stat().st_size for file in part.files if file.is_file())
            if size >= BATCH_BYTES or len(batch) == BATCH_PARTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _tried(self, batch: list[Part]) -> Tried:
        """The trial of the tables that these parts still have to read."""
        files = [file for part in batch if not part.path.exists() for file in part.files if file.is_file()]
        return Tried(files, REMEDY)

    def _make(self, part: Part, tables: Tried, advance: Advance) -> None:
        """Build a part if it is missing, and take it in; one that is damaged is built a second time."""

        def count(latents: int) -> None:
            part.done += latents
            advance(latents)

        def build(path: Path) -> None:
            part.done = 0
            if part.number == TEXT:
                build_text(path, self.suite, tables)
            else:
                build_sae(path, self.suite, self._record.saes[part.number], tables, count)

        try:
            ensure(part.path, build)
            self.index.adopt(part.number, part.path)
        except DAMAGED_INDEX:
            part.path.unlink(missing_ok=True)
            tables = self._tried([part])
            ensure(part.path, build)
            self.index.adopt(part.number, part.path)
        if part.number != TEXT:
            count(self._record.saes[part.number].width - part.done)
        part.ready.set()
