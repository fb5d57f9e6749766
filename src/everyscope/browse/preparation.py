"""From a suite's folder to its open index, building that if need be: in this thread, or behind pages that say how far it is."""

import os
import threading
from pathlib import Path

from everyscope.base.errors import DataError, EveryscopeError, first_line
from everyscope.base.progress import meter
from everyscope.browse.build import build_index, input_files
from everyscope.browse.cache import ensure_index, index_path
from everyscope.browse.queries import DAMAGED_INDEX, Index
from everyscope.circuits.files import FOLDER, graphs_in
from everyscope.suite.layout import INDEX_FILE, suite_folder
from everyscope.suite.records import SuiteIndex, read_index


def read_suite(path: Path) -> tuple[Path, SuiteIndex]:
    """The folder of the suite in `path` and its suite.json; ConfigError or DataError where it is none that can be browsed."""
    suite = suite_folder(path)
    index = read_index(suite)
    if not index.saes:
        raise DataError(f"{suite / INDEX_FILE}: lists no SAE; publish the suite again")
    return suite, index


class Preparation:
    """An index that is being made ready; requests ask how far it is."""

    def __init__(self, suite: Path, cache: Path | None) -> None:
        """Reads suite.json, which is quick, so that a folder that is no suite is refused at once; raises as `read_suite`."""
        self.suite, self._record = read_suite(suite)
        self._path = index_path(self.suite, input_files(self.suite, self._record), cache)
        self._total = sum(sae.width for sae in self._record.saes)
        self._done = 0
        self.title = self._record.title
        self.index: Index | None = None
        self.error = ""

    @property
    def share(self) -> float:
        """How much of the index is built [1]; 0 as long as another process builds it."""
        return min(1.0, self._done / max(1, self._total))

    def run(self) -> Index:
        """Build the index if it is missing or damaged, and open it; StorageError where it cannot be written."""
        try:
            self.index = Index(ensure_index(self._path, self._build))
        except DAMAGED_INDEX:
            self.forget()
            self.index = Index(ensure_index(self._path, self._build))
        return self.index

    @property
    def graphs(self) -> dict[str, Path]:
        """The suite's attribution graphs by name: those beside it, and those that pages made of a read-only suite."""
        return graphs_in(self._path.parent) | graphs_in(self.suite)

    @property
    def new_graphs(self) -> Path:
        """Folder of the graphs that pages make: the suite's own, or where that cannot be written one beside the index."""
        beside = self.suite / FOLDER
        return beside if os.access(beside if beside.is_dir() else self.suite, os.W_OK) else self._path.parent / FOLDER

    def forget(self) -> None:
        """Take a damaged index away: the next start builds it."""
        self._path.unlink(missing_ok=True)

    def start(self) -> threading.Thread:
        """Do that in a thread; an error is kept for the pages."""

        def work() -> None:
            try:
                self.run()
            except EveryscopeError as error:
                self.error = str(error)
            except Exception as error:  # whatever it is, the pages must not say "preparing" for ever
                self.error = f"a fault of everyscope's, or want of memory ({type(error).__name__}: {first_line(error)[:200]})"

        thread = threading.Thread(target=work, name="index", daemon=True)
        thread.start()
        return thread

    @property
    def is_built(self) -> bool:
        """Whether an earlier run has left the index, so that it opens at once."""
        return self._path.exists()

    def _build(self, path: Path) -> None:
        with meter("index", self._total, "latents") as progress:

            def advance(count: int) -> None:
                self._done += count
                progress.advance(count)

            build_index(path, self.suite, self._record, advance)
