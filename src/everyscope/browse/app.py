"""The pages over HTTP: addresses, headers and errors. What a page holds is made in views/.

Nothing that a request holds ever becomes a path: SAEs are looked up by name in the index, files of static/ in a table. Every
answer forbids scripts, styles and pictures from elsewhere, and requests under another host's name are refused, so that no
page of a stranger can read this server through the user's browser.
"""

import asyncio
import re
import sqlite3
import threading
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from everyscope.base.errors import EveryscopeError
from everyscope.browse.circuit_file import circuit_file
from everyscope.browse.guard import FORM_SECONDS, Forbidden, read_form, require_own
from everyscope.browse.light import Light
from everyscope.browse.links import Links, Served
from everyscope.browse.live import MAX_ASKED, Asking, Busy, LiveFactory, LiveModel, Stopped
from everyscope.browse.pages import TYPES, environment, render, stamps, static_files
from everyscope.browse.parts import TEXT, Preparing
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.report import report_answer, report_files
from everyscope.browse.safe import SafeHeaders
from everyscope.browse.search import SearchRequest, jump
from everyscope.browse.streaming import Say, streamed, until_left
from everyscope.browse.table_page import TableRequest
from everyscope.browse.views.asked_circuit import (
    ablation_json,
    ablation_request,
    circuit_request,
    drawn,
    foreign_request,
    new_circuit_view,
)
from everyscope.browse.views.circuit import card_of, circuit_data, circuit_foreign, circuit_view, circuits_view
from everyscope.browse.views.compare import compare_view
from everyscope.browse.views.fields import Query
from everyscope.browse.views.latent import latent_json, latent_view
from everyscope.browse.views.sae import sae_view
from everyscope.browse.views.search import search_view
from everyscope.browse.views.steer import Shown, caption_view, column_titles, steer, steer_request, steer_view
from everyscope.browse.views.suite import comparisons_view, suite_view
from everyscope.browse.views.text import pane_view, text_view
from everyscope.browse.views.try_text import tried_view
from everyscope.circuits.files import read_graph
from everyscope.circuits.graph import Graph

HOSTS = ["127.0.0.1", "localhost"]
"""The names under which this server answers: a stranger's domain that points at this machine is none of them."""
SAE_PATH = "/sae/{site}/{layer}/{width}/{l0}"


class NoSuchPage(EveryscopeError):
    """An address that leads nowhere."""


class LatentNumber(Convertor[int]):
    """A latent's number in an address; of one with thousands of digits Python would refuse to make an int."""

    regex = "[0-9]{1,12}"

    def convert(self, value: str) -> int:
        """From the address."""
        return int(value)

    def to_string(self, value: int) -> str:
        """Into an address."""
        return str(value)


register_url_convertor("latent", LatentNumber())
LiveAnswer = Callable[[Request, Index, Asking, Query], Response]
LiveView = Callable[[Index, Links, Asking, Query], dict[str, Any]]
STATUS = {
    NoSuchPage: (404, "No such page"),
    Forbidden: (403, "Not from here"),
    Busy: (503, "The language model is busy"),
    Stopped: (503, "The language model took too long"),
}
"""What errors are answered with: status and title; others are 422."""


class Browser:
    """One suite's pages. Endpoints are plain functions: Starlette runs them in threads, the index has a connection for each."""

    def __init__(self, preparation: Preparation, live: LiveFactory | None) -> None:
        """Over an index whose parts may still be in the making."""
        self._preparation = preparation
        self._live = LiveModel(live)
        self._files = static_files()
        self._links = Served(stamps(self._files), has_report="index.html" in report_files(preparation.suite))
        self._templates = environment()
        self._cached: tuple[int, str] | None = None
        self._lock = threading.Lock()
        self._waiting = ThreadPoolExecutor(2 * MAX_ASKED, thread_name_prefix="live")

    def app(self) -> ASGIApp:
        """The ASGI application."""
        pages: dict[str, Callable[[Request, Index], Response]] = {
            "/": self._suite,
            "/comparisons": self._comparisons,
            "/search": self._search,
            "/report/": self._report,
            "/report/{name}": self._report,
            "/mine": lambda request, index: self._page("mine", index),
            "/help": lambda request, index: self._page("help", index),
            "/compare": self._compare,
            "/circuits": self._circuits,
            "/circuit/new": self._new_circuit,
            "/circuit/{name}.json": self._circuit_data,
            "/circuit/{name}/circuit-tracer.json": self._circuit_foreign,
            "/circuit/{name}/page.html": self._circuit_file,
            "/circuit/{name}/card/{coder:latent}/{latent:latent}": self._circuit_card,
            "/circuit/{name}": self._circuit,
            f"{SAE_PATH}/": self._sae,
            f"{SAE_PATH}/{{latent:latent}}.json": self._raw,
            f"{SAE_PATH}/{{latent:latent}}": self._latent,
            "/caption": self._caption,
        }
        routes = [Route(path, self._ready(page)) for path, page in pages.items()]
        live = {
            "/text": self._asked_page("text", text_view),
            "/text/pane": self._asked_page("pane", pane_view),
            "/steer": self._asked_page("steer", steer_view),
            f"{SAE_PATH}/{{latent:latent}}/try": self._asked(self._tried),
        }
        routes += [Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in live.items()]
        asked = {"/circuit/new": self._asked(self._draw), "/circuit/{name}/ablate": self._asked(self._ablate)}
        asked["/steer/stream"] = self._stream
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in asked.items()]
        routes += [Route("/static/{name}", self._static), Route("/state", self._state)]
        handlers = {404: self._not_found, Preparing: self._preparing, EveryscopeError: self._failed, 500: self._broken}
        handlers |= dict.fromkeys((sqlite3.DatabaseError, zlib.error), self._damaged)
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
        # Around everything: as a middleware of Starlette's it would miss the answers to our own faults.
        return SafeHeaders(Light(Starlette(routes=routes, middleware=hosts, exception_handlers=handlers)))

    def _ready(self, page: Callable[[Request, Index], Response]) -> Callable[[Request], Response]:
        """`page`, given the index."""
        return lambda request: page(request, self._preparation.index)

    def _preparing(self, request: Request, missing: Exception) -> Response:
        """How far the part is that a page needs."""
        if self._preparation.error:
            return self._page("error", None, 500, title="This suite cannot be indexed", message=self._preparation.error)
        assert isinstance(missing, Preparing)
        index, number = self._preparation.index, missing.number
        sae = None if number == TEXT else index.saes[number]
        answer = self._page("preparing", index, 503, number=number, sae=sae, share=self._preparation.share_of(number))
        answer.headers["retry-after"] = "1"
        return answer

    def _page(self, name: str, index: Index | None, status: int = 200, **view: Any) -> HTMLResponse:
        return HTMLResponse(render(self._templates, name, index, self._links, **view), status)

    def _suite(self, request: Request, index: Index) -> Response:
        state = index.num_indexed
        with self._lock:  # the same for everyone, and the only page that draws a whole suite
            if self._cached is None or self._cached[0] != state:
                html = render(self._templates, "suite", index, self._links, **suite_view(index, self._links))
                self._cached = (state, html)
            return HTMLResponse(self._cached[1])

    def _comparisons(self, request: Request, index: Index) -> Response:
        return self._page("comparisons", index, **comparisons_view(index, self._links))

    def _find(self, request: Request, index: Index) -> SaeFacts:
        folder = "/".join(request.path_params[name] for name in ("site", "layer", "width", "l0"))
        sae = index.find(folder)
        if sae is None:
            raise NoSuchPage(f"this suite has no SAE {folder[:200]!r}; the first page lists those that it has")
        return sae

    def _sae(self, request: Request, index: Index) -> Response:
        table = TableRequest.read(dict(request.query_params))
        return self._page("sae", index, **sae_view(index, self._links, self._find(request, index), table))

    def _latent(self, request: Request, index: Index) -> Response:
        return self._tried(request, index, self._live.asking(), {})

    def _tried(self, request: Request, index: Index, asking: Asking, query: Query) -> Response:
        """A latent, with the text that was tried on it."""
        sae, latent = self._find(request, index), request.path_params["latent"]
        index.require(sae)
        is_there = sae.problem is None and latent < sae.width
        tried = tried_view(index, self._links, asking, sae, latent, query) if is_there else None
        view = latent_view(index, self._links, sae, latent, asking.state, tried)
        if view is None:
            raise NoSuchPage(sae.problem or f"this SAE has latents 0 to {sae.width - 1}")
        return self._page("latent", index, **view)

    def _caption(self, request: Request, index: Index) -> Response:
        query = {key: request.query_params.getlist(key) for key in request.query_params}
        return self._page("caption", index, **caption_view(index, self._links, query))

    def _raw(self, request: Request, index: Index) -> Response:
        found = latent_json(index, self._find(request, index), request.path_params["latent"])
        return JSONResponse(found) if found else JSONResponse({"error": "no such latent"}, 404)

    def _search(self, request: Request, index: Index) -> Response:
        query = SearchRequest.read(dict(request.query_params))
        if place := jump(index, query.typed):
            sae, latent = place
            return RedirectResponse(
                self._links.sae(sae.folder) if latent is None else self._links.latent(sae.folder, latent), 303
            )
        return self._page("search", index, **search_view(index, self._links, query))

    def _report(self, request: Request, index: Index) -> Response:
        name = request.path_params.get("name", "index.html")
        answer = report_answer(report_files(self._preparation.suite), name, index, self._links)
        if answer is None:
            raise NoSuchPage("the report of this suite has no such file; `everyscope publish` writes it")
        return answer

    def _compare(self, request: Request, index: Index) -> Response:
        one, other = (index.find(request.query_params.get(name, "")) for name in ("a", "b"))
        for sae in (one, other):
            if one is not None and other is not None and sae is not None:
                index.require(sae)
        return self._page("compare", index, **compare_view(index, self._links, one, other))

    def _circuits(self, request: Request, index: Index) -> Response:
        return self._page("circuits", index, **circuits_view(self._preparation.graphs, self._links))

    def _new_circuit(self, request: Request, index: Index) -> Response:
        try:
            require_own(request)
            is_own = request.headers.get("sec-fetch-site") == "same-origin"
        except Forbidden:
            is_own = False
        query = {key: request.query_params.getlist(key) for key in request.query_params}
        return self._page("circuit_new", index, **new_circuit_view(index, query, self._live.asking(), is_own=is_own))

    def _draw(self, request: Request, index: Index, asking: Asking, query: Query) -> Response:
        name = drawn(self._preparation, asking, circuit_request(query))
        return RedirectResponse(self._links.circuit(name), 303)

    def _ablate(self, request: Request, index: Index, asking: Asking, query: Query) -> Response:
        graph = self._graph(request)[1]
        asked = ablation_request(graph, query)
        return JSONResponse(ablation_json(graph, asked, asking.ablate(graph, asked)))

    def _graph(self, request: Request) -> tuple[str, Graph]:
        """The name of a graph, and the graph; names are looked up, so that no address becomes a path."""
        name, known = request.path_params["name"], self._preparation.graphs
        if name not in known:
            raise NoSuchPage(f"this suite has no graph {name[:200]!r}; `everyscope circuit` makes some")
        return name, read_graph(known[name])

    def _circuit(self, request: Request, index: Index) -> Response:
        return self._page("circuit", index, **circuit_view(self._links, *self._graph(request)))

    def _circuit_data(self, request: Request, index: Index) -> Response:
        can_ablate = self._live.state != "absent"
        return JSONResponse(circuit_data(index, self._links, *self._graph(request), can_ablate=can_ablate))

    def _circuit_card(self, request: Request, index: Index) -> Response:
        coders, place = self._graph(request)[1].facts.coders, request.path_params["coder"]
        sae = index.find(coders[place].name) if place < len(coders) else None
        card = card_of(index, sae, request.path_params["latent"])
        return JSONResponse(card) if card else JSONResponse({"error": "no such latent"}, 404)

    def _circuit_file(self, request: Request, index: Index) -> Response:
        name, graph = self._graph(request)
        return HTMLResponse(circuit_file(index, name, graph), headers=_download(f"{name}.html"))

    def _circuit_foreign(self, request: Request, index: Index) -> Response:
        query = {key: request.query_params.getlist(key) for key in request.query_params}
        name, graph = self._graph(request)
        found = circuit_foreign(index, name, *foreign_request(graph, query))
        return JSONResponse(found, headers=_download(f"{name}.json"))

    def _asked_page(self, name: str, view: LiveView) -> Callable[[Request], Awaitable[Response]]:
        """A page that may ask the language model."""
        return self._asked(lambda request, index, live, query: self._page(name, index, **view(index, self._links, live, query)))

    def _asked(self, respond: LiveAnswer) -> Callable[[Request], Awaitable[Response]]:
        """What may ask the language model. It waits in threads of its own, so that no other page ever waits for it."""

        async def endpoint(request: Request) -> Response:
            query, asking = await _query(request), self._live.asking()
            page = self._ready(lambda request, index: respond(request, index, asking, query))
            answer = asyncio.get_running_loop().run_in_executor(self._waiting, page, request)
            await until_left(request, asking, answer)
            return await answer

        return endpoint

    async def _stream(self, request: Request) -> Response:
        """Steering, each token as soon as it is written; the last line has the whole answer as the page shows it."""
        query, asking, index = await _query(request), self._live.asking(), self._preparation.index
        asked = steer_request(index, query)

        def work(say: Say) -> None:
            titles, count = column_titles(asked), len(asked.strengths)
            shown = Shown(count)
            result = steer(index, self._links, asking, asked, each=lambda step: say({"titles": titles} | shown.add(step)))
            html = render(self._templates, "written", index, self._links, result=result)
            say({"html": html})

        return await streamed(work, request, asking, self._waiting)

    def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            return Response("no such file", 404)
        kind = TYPES[f".{name.rpartition('.')[2]}"]
        return Response(self._files[name], media_type=kind, headers={"cache-control": "max-age=31536000, immutable"})

    def _state(self, request: Request) -> Response:
        """For scripts: how far index and model are; `part` names one part of the index."""
        preparation, asked = self._preparation, request.query_params.get("part", "")
        number = int(asked) if re.fullmatch(r"-1|\d{1,6}", asked, re.ASCII) and int(asked) < len(preparation.index.saes) else None
        is_ready = preparation.index.is_whole if number is None else preparation.is_ready(number)
        share = preparation.share if number is None else preparation.share_of(number)
        state = {"is_ready": is_ready, "share": share, "indexed": preparation.index.num_indexed, "error": preparation.error}
        state |= {"model": self._live.state, "done": self._live.done}
        return JSONResponse(state, headers={"cache-control": "no-store"})

    def _not_found(self, request: Request, error: Exception) -> Response:
        message = "no such page; the first page links to all of them"
        return self._page("error", self._preparation.index, 404, title="No such page", message=message)

    def _failed(self, request: Request, error: Exception) -> Response:
        status, title = next((its for kind, its in STATUS.items() if isinstance(error, kind)), (422, "That did not work"))
        if request.headers.get("accept") == "application/json":
            answer: Response = JSONResponse({"error": str(error)}, status)
        else:
            leads = self._leads(request)
            answer = self._page("error", self._preparation.index, status, title=title, message=str(error), leads=leads)
        if status == 503:
            answer.headers["retry-after"] = "5"
        return answer

    def _leads(self, request: Request) -> list[tuple[str, str | None]]:
        """From an address that leads nowhere: the SAE that it names, and the latent nearest the one that is not there."""
        found = request.path_params
        index = self._preparation.index
        sae = index.find("/".join(str(found.get(name)) for name in ("site", "layer", "width", "l0")))
        if sae is None:
            return []
        near = [] if sae.problem or "latent" not in found else [min(found["latent"], sae.width - 1)]
        return [(sae.title, self._links.sae(sae.folder)), *((f"Latent {n}", self._links.latent(sae.folder, n)) for n in near)]

    def _damaged(self, request: Request, error: Exception) -> Response:
        """The index, which is a file in the user's cache, was changed after it was written."""
        self._preparation.forget()
        message = f"the index of this suite is damaged ({error}) and was deleted; open the page again to have it rebuilt"
        return self._page("error", None, 500, title="The index is damaged", message=message)

    def _broken(self, request: Request, error: Exception) -> Response:
        """A fault of ours: the page says so, the terminal has the traceback."""
        message = "an internal error of everyscope; the terminal where it was started shows details"
        return self._page("error", self._preparation.index, 500, title="Something broke", message=message)


def _download(name: str) -> dict[str, str]:
    """The header that saves an answer as a file of this name."""
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


async def _query(request: Request) -> Query:
    """What a form or an address asks; Forbidden where another site's page has the model asked."""
    if request.method == "POST":
        require_own(request)
        return await asyncio.wait_for(read_form(request), FORM_SECONDS)
    query = {key: request.query_params.getlist(key) for key in request.query_params}
    if any(any(query.get(field, ())) for field in ("text", "prompt")):
        require_own(request)
    return query
