"""The same pages as files, for any web host: the templates and views of the server, with links that are relative.

Written beside its destination and renamed, so that an export is whole or absent. What needs the server (searching, sorting) or
the language model says so on its page.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import PARTIAL, make_folder, storage_errors
from everyscope.base.progress import meter, say
from everyscope.browse.circuit_file import inlined
from everyscope.browse.config import ExportConfig
from everyscope.browse.links import Exported, compare_file, latent_file, sae_file
from everyscope.browse.live import LiveModel
from everyscope.browse.pages import environment, render, static_files
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.report import report_files, report_page
from everyscope.browse.table_page import PAGE, TableRequest
from everyscope.browse.views.circuit import circuit_view, circuits_view
from everyscope.browse.views.compare import compare_view
from everyscope.browse.views.latent import latent_json, latent_view
from everyscope.browse.views.sae import sae_view
from everyscope.browse.views.steer import steer_view
from everyscope.browse.views.suite import comparisons_view, suite_view
from everyscope.browse.views.text import text_view
from everyscope.circuits.files import read_graph

MARK = ".everyscope-export"
"""A file in every export: only a folder that has it is ever replaced."""


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    first_page: Path
    """Open it in a browser, or point a web host at its folder."""
    num_pages: int
    """Pages [pages]."""


def run(config: ExportConfig) -> ExportResult:
    """Write all pages of a suite; ConfigError where `out` holds something else, errors of reading the suite as for browsing."""
    if config.out.exists() and not ((config.out / MARK).exists() or (config.out.is_dir() and not any(config.out.iterdir()))):
        raise ConfigError(f"{config.out}: holds something that is no export; choose another folder with --out")
    preparation = Preparation(config.suite, config.cache)
    index = preparation.run()
    partial = config.out.with_name(config.out.name + PARTIAL)
    with storage_errors(config.out):
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        report = report_files(preparation.suite)
        num_pages = _Export(index, partial, config.max_latents, _graphs(preparation.graphs), report).write()
        (partial / MARK).write_text("Replaced by the next export into this folder.\n", encoding="utf-8")
        if config.out.exists():
            shutil.rmtree(config.out)
        partial.replace(config.out)
    return ExportResult(config.out / "index.html", num_pages)


def _graphs(paths: Mapping[str, Path]) -> dict[str, Path]:
    """Those that can be read; the others are told."""
    found = {}
    for name, path in paths.items():
        try:
            read_graph(path)
        except DataError as error:
            say(f"left out: {error}")
        else:
            found[name] = path
    return found


class _Export:
    """Writes every page below one folder; files need not be whole one by one, for the folder is."""

    def __init__(
        self, index: Index, out: Path, max_latents: int | None, graphs: Mapping[str, Path], report: Mapping[str, Path]
    ) -> None:
        self._index, self._out, self._graphs, self._report = index, out, graphs, report
        self._templates, self._live = environment(), LiveModel(None).asking()
        readable = [sae for sae in index.saes if sae.problem is None]
        self._widths = {sae.folder: min(sae.width, max_latents or sae.width) for sae in readable}
        self._pages = {sae.folder: max(1, -(-sae.num_alive // PAGE)) for sae in index.saes}
        pairs = ((index.saes[one], index.saes[other]) for one, other in index.matched_pairs() if other < len(index.saes))
        self._pairs = {(one.folder, other.folder): f"{one.number}-{other.number}" for one, other in pairs}
        self._count = 0

    def write(self) -> int:
        """Everything; how many pages that were."""
        for name, content in static_files().items():
            make_folder(self._out / "static")
            (self._out / "static" / name).write_bytes(content)
        with meter("export", sum(self._widths.values()) + len(self._index.saes), "pages") as progress:
            self._write_overviews()
            for sae in self._index.saes:
                self._write_sae(sae)
                progress.advance()
                for latent in range(self._widths.get(sae.folder, 0)):
                    self._write_latent(sae, latent)
                    progress.advance()
        return self._count

    def _links(self, depth: int) -> Exported:
        return Exported(depth, self._widths, self._pages, self._pairs, self._graphs, "index.html" in self._report)

    def _page(self, path: str, name: str, links: Exported, view: dict[str, object]) -> None:
        file = self._out / path
        make_folder(file.parent)
        file.write_text(render(self._templates, name, self._index, links, **view), encoding="utf-8")
        self._count += 1

    def _write_overviews(self) -> None:
        index, links = self._index, self._links(0)
        self._page("index.html", "suite", links, suite_view(index, links))
        self._page("comparisons.html", "comparisons", links, comparisons_view(index, links))
        self._page("mine.html", "mine", links, {})
        self._page("help.html", "help", links, {})
        self._page("compare.html", "compare", links, compare_view(index, links, None, None))
        self._page("text.html", "text", links, text_view(index, links, self._live, {}))
        self._page("steer.html", "steer", links, steer_view(index, links, self._live, {}))
        deeper = self._links(1)
        for name, path in self._report.items():
            make_folder(self._out / "report")
            if path.suffix == ".html":
                page = report_page(path, index, deeper, is_served=False)
                (self._out / "report" / name).write_text(page, encoding="utf-8")
            else:
                shutil.copyfile(path, self._out / "report" / name)
        if self._graphs:
            self._page("circuits.html", "circuits", links, circuits_view(self._graphs, links))
        for name, path in self._graphs.items():
            graph = read_graph(path)
            view = circuit_view(deeper, name, graph, inlined(index, deeper, name, graph))
            self._page(f"circuit/{name}.html", "circuit", deeper, view)
        for (one, other), name in self._pairs.items():
            view = compare_view(index, deeper, index.find(one), index.find(other))
            self._page(compare_file(name), "compare", deeper, view)

    def _write_sae(self, sae: SaeFacts) -> None:
        for page in range(1, self._pages[sae.folder] + 1):
            path = sae_file(sae.folder, page)
            links = self._links(path.count("/"))
            self._page(path, "sae", links, sae_view(self._index, links, sae, TableRequest(page=page)))

    def _write_latent(self, sae: SaeFacts, latent: int) -> None:
        path = latent_file(sae.folder, latent)
        links = self._links(path.count("/"))
        view = latent_view(self._index, links, sae, latent)
        assert view is not None, f"{sae.folder}: the index lacks latent {latent}"
        self._page(path, "latent", links, view)
        raw = json.dumps(latent_json(self._index, sae, latent), allow_nan=False)
        (self._out / f"{path.removesuffix('.html')}.json").write_text(raw, encoding="utf-8")
