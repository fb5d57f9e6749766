"""From a suite's folder to its open index, building that if need be: in this thread, or behind pages that say how far it is."""

import re
import threading
from pathlib import Path

from everyscope.base.errors import DataError, EveryscopeError
from everyscope.base.progress import meter
from everyscope.browse.build import build_index, input_files
from everyscope.browse.cache import ensure_index, index_path, suite_folder
from everyscope.browse.queries import Index
from everyscope.sites.names import SITE_KINDS
from everyscope.suite.layout import INDEX_FILE
from everyscope.suite.records import SuiteIndex, read_index

FOLDER = re.compile(rf"({'|'.join(SITE_KINDS)})/layer_\d+/width_\w+/average_l0_\w+", re.ASCII)
"""The names that SAEs' folders may have: a suite comes from anywhere, and its index must not lead out of it."""


def read_suite(path: Path) -> tuple[Path, SuiteIndex]:
    """The folder of the suite in `path` and its suite.json; ConfigError or DataError where it is none that can be browsed."""
    suite = suite_folder(path)
    index = read_index(suite)
    names = [sae.folder for sae in index.saes]
    strange = next((name for name in names if not FOLDER.fullmatch(name)), None)
    if strange is not None:
        raise DataError(f"{suite / INDEX_FILE}: names the folder {strange[:200]!r}; expected site/layer_L/width_W/average_l0_N")
    if not names or len(set(names)) < len(names):
        raise DataError(f"{suite / INDEX_FILE}: lists no SAE, or one twice; publish the suite again")
    return suite, index


class Preparation:
    """An index that is being made ready; requests ask how far it is."""

    def __init__(self, suite: Path, cache: Path | None) -> None:
        """Reads suite.json, which is quick, so that a folder that is no suite is refused at once; raises as `read_suite`."""
        self._suite, self._record = read_suite(suite)
        self._path = index_path(self._suite, input_files(self._suite, self._record), cache)
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
        """Build the index if it is missing, and open it; StorageError where it cannot be written."""
        self.index = Index(ensure_index(self._path, self._build))
        return self.index

    def start(self) -> threading.Thread:
        """Do that in a thread; an error is kept for the pages."""

        def work() -> None:
            try:
                self.run()
            except EveryscopeError as error:
                self.error = str(error)

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

            build_index(path, self._suite, self._record, advance)
