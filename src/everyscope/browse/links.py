"""Addresses of pages: those of the server, and those of an export, relative and only where a page was written."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, urlencode

LATENTS_PER_FOLDER = 1000
"""Pages in one folder of an export: some hosts refuse larger ones [pages]."""


class Links(Protocol):
    """Where each page is; None where there is none, and the page then shows plain text."""

    def asset(self, name: str) -> str:
        """A file of static/."""
        ...

    def suite(self) -> str | None:
        """The first page."""
        ...

    def sae(self, folder: str, query: Mapping[str, str] | None = None) -> str | None:
        """An SAE, with the page of its table that `query` says."""
        ...

    def latent(self, folder: str, latent: int) -> str | None:
        """A latent."""
        ...

    def raw(self, folder: str, latent: int) -> str | None:
        """A latent as JSON."""
        ...

    def search(self, query: Mapping[str, str] | None = None) -> str | None:
        """The search over the whole suite."""
        ...

    def live(self, page: str, query: Mapping[str, str] | None = None) -> str | None:
        """What needs the language model: `text` or `steer`."""
        ...

    def compare(self, one: str = "", other: str = "") -> str | None:
        """Two SAEs side by side, or the choice of them."""
        ...

    def comparisons(self) -> str | None:
        """What was measured over the whole suite."""
        ...

    def report(self) -> str | None:
        """The suite's report."""
        ...

    def mine(self) -> str | None:
        """The reader's own latents."""
        ...

    def help(self, name: str = "") -> str | None:
        """What the words mean, or one of them."""
        ...

    def latent_pattern(self) -> str:
        """Where a latent is, for scripts: {folder}, {latent}, and {thousand}, the latent's number over 1,000."""
        ...

    def circuits(self) -> str | None:
        """The list of attribution graphs."""
        ...

    def circuit(self, name: str, form: str = "") -> str | None:
        """One of them: its page, or with `form` its data as `.json` or `/circuit-tracer.json`, and what else belongs to it; `new`
        is the form that makes one.
        """
        ...


@dataclass(frozen=True)
class Served:
    """Addresses on our own server."""

    stamps: Mapping[str, str]
    """Of each file of static/ a hash, so that browsers may keep it."""
    has_report: bool = False
    """Whether the suite has one."""

    def asset(self, name: str) -> str:
        """See Links."""
        return f"/static/{name}?{self.stamps[name]}"

    def suite(self) -> str:
        """See Links."""
        return "/"

    def sae(self, folder: str, query: Mapping[str, str] | None = None) -> str:
        """See Links."""
        return f"/sae/{quote(folder)}/{_query(query)}"

    def latent(self, folder: str, latent: int) -> str:
        """See Links."""
        return f"/sae/{quote(folder)}/{latent}"

    def raw(self, folder: str, latent: int) -> str:
        """See Links."""
        return f"/sae/{quote(folder)}/{latent}.json"

    def search(self, query: Mapping[str, str] | None = None) -> str:
        """See Links."""
        return f"/search{_query(query)}"

    def live(self, page: str, query: Mapping[str, str] | None = None) -> str:
        """See Links."""
        return f"/{page}{_query(query)}"

    def compare(self, one: str = "", other: str = "") -> str:
        """See Links."""
        return f"/compare{_query({'a': one, 'b': other})}"

    def comparisons(self) -> str:
        """See Links."""
        return "/comparisons"

    def report(self) -> str | None:
        """See Links."""
        return "/report/" if self.has_report else None

    def mine(self) -> str:
        """See Links."""
        return "/mine"

    def help(self, name: str = "") -> str:
        """See Links."""
        return f"/help#{name}" if name else "/help"

    def latent_pattern(self) -> str:
        """See Links."""
        return "/sae/{folder}/{latent}"

    def circuits(self) -> str:
        """See Links."""
        return "/circuits"

    def circuit(self, name: str, form: str = "") -> str:
        """See Links."""
        return f"/circuit/{quote(name, safe='')}{form}"


@dataclass(frozen=True)
class Exported:
    """Addresses in an export, as seen from one of its pages."""

    depth: int
    """Folders between the export's root and the page."""
    widths: Mapping[str, int]
    """By SAE, how many of its latents have pages [latents]."""
    pages: Mapping[str, int]
    """By SAE, how many pages its table has [pages]."""
    pairs: Mapping[tuple[str, str], str]
    """By pair of SAEs that are compared, the name of that page."""
    graphs: Collection[str] = ()
    """Names of the attribution graphs."""
    has_report: bool = False
    """Whether the suite has one."""

    def _at(self, path: str) -> str:
        return "../" * self.depth + path

    def asset(self, name: str) -> str:
        """See Links."""
        return self._at(f"static/{name}")

    def suite(self) -> str:
        """See Links."""
        return self._at("index.html")

    def sae(self, folder: str, query: Mapping[str, str] | None = None) -> str | None:
        """See Links; only pages of the default table are written."""
        query = {name: value for name, value in (query or {}).items() if value}
        page = int(query.pop("page", "1"))
        if query or folder not in self.pages or not 1 <= page <= self.pages[folder]:
            return None
        return self._at(sae_file(folder, page))

    def latent(self, folder: str, latent: int) -> str | None:
        """See Links."""
        return self._at(latent_file(folder, latent)) if 0 <= latent < self.widths.get(folder, 0) else None

    def raw(self, folder: str, latent: int) -> str | None:
        """See Links."""
        found = self.latent(folder, latent)
        return found and f"{found.removesuffix('.html')}.json"

    def search(self, query: Mapping[str, str] | None = None) -> None:
        """See Links; searching needs the server."""

    def live(self, page: str, query: Mapping[str, str] | None = None) -> str | None:
        """See Links; the page says what it needs."""
        return None if query else self._at(f"{page}.html")

    def compare(self, one: str = "", other: str = "") -> str | None:
        """See Links."""
        if not one and not other:
            return self._at("compare.html")
        name = self.pairs.get((one, other))
        return name and self._at(compare_file(name))

    def comparisons(self) -> str:
        """See Links."""
        return self._at("comparisons.html")

    def report(self) -> str | None:
        """See Links."""
        return self._at("report/index.html") if self.has_report else None

    def mine(self) -> str:
        """See Links."""
        return self._at("mine.html")

    def help(self, name: str = "") -> str:
        """See Links."""
        return self._at(f"help.html#{name}" if name else "help.html")

    def latent_pattern(self) -> str:
        """See Links; pages that were not written lead nowhere."""
        return self._at("sae/{folder}/{thousand}/{latent}.html")

    def circuits(self) -> str | None:
        """See Links."""
        return self._at("circuits.html") if self.graphs else None

    def circuit(self, name: str, form: str = "") -> str | None:
        """See Links; everything of a graph is inside its page."""
        return self._at(f"circuit/{quote(name, safe='')}.html") if name in self.graphs and not form else None


class Nowhere:
    """No addresses at all: of a page that is one file."""

    def asset(self, name: str) -> str:
        """See Links; nobody asks, for the file holds what it needs."""
        raise AssertionError(f"{name}: a page in one file has no files beside it")

    def _none(self, *names: object, **more: object) -> None:
        """See Links."""

    suite = sae = latent = raw = search = live = compare = comparisons = report = mine = help = circuits = circuit = _none

    def latent_pattern(self) -> str:
        """See Links; no latent has a page."""
        return ""


def sae_file(folder: str, page: int) -> str:
    """Where an export keeps a page of an SAE's table."""
    return f"sae/{folder}/index.html" if page == 1 else f"sae/{folder}/page-{page}.html"


def latent_file(folder: str, latent: int) -> str:
    """Where an export keeps a latent."""
    return f"sae/{folder}/{latent // LATENTS_PER_FOLDER}/{latent}.html"


def compare_file(name: str) -> str:
    """Where an export keeps a comparison of two SAEs."""
    return f"compare/{name}.html"


def _query(query: Mapping[str, str] | None) -> str:
    kept = {name: value for name, value in (query or {}).items() if value}
    return f"?{urlencode(kept)}" if kept else ""
