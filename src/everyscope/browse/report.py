"""The suite's report among its pages: its links lead to SAEs' pages, and it runs as a stranger, for anybody may have made it.

Served, it is sandboxed: its script sorts its tables, and reaches neither these pages nor a network. Exported, it has no script.
"""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import escape
from starlette.responses import Response

from everyscope.base.files import read_bytes
from everyscope.browse.links import Links
from everyscope.browse.queries import Index
from everyscope.suite.layout import REPORT_FILE

TYPES = {".html": "text/html", ".png": "image/png", ".pdf": "application/pdf"}
ALONE = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SANDBOX = (
    "sandbox allow-scripts allow-downloads allow-top-navigation-by-user-activation; "
    f"{ALONE}; script-src 'unsafe-inline'; frame-ancestors 'none'"
)


def report_files(suite: Path) -> dict[str, Path]:
    """The report and its figures by name: what is served is looked up here, so that no address reaches the file system."""
    folder = (suite / REPORT_FILE).parent
    return {path.name: path for path in sorted(folder.glob("*")) if path.suffix in TYPES and path.is_file()}


def report_page(path: Path, index: Index, links: Links, *, is_served: bool) -> str:
    """The report as a page: links to SAEs' folders lead to their pages, and a line leads back."""
    text = read_bytes(path).decode("utf-8", "replace")
    for sae in index.saes:
        address = links.sae(sae.folder)
        if address:
            text = text.replace(f'href="../{sae.folder}/"', f'href="{escape(address)}"')
    back = f'<p class="note"><a href="{escape(links.suite() or "")}">Pages of {escape(index.suite["title"])}</a></p>'
    text = text.replace("<main>", f"<main>\n{back}", 1)
    return text if is_served else f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{ALONE}">{text}'


def report_answer(files: Mapping[str, Path], name: str, index: Index, links: Links) -> Response | None:
    """The report or one of its figures over HTTP; None where there is no such file."""
    path = files.get(name)
    if path is None:
        return None
    is_page = path.suffix == ".html"
    content = report_page(path, index, links, is_served=True) if is_page else read_bytes(path)
    headers = {"content-security-policy": SANDBOX} if is_page else {}  # browsers refuse to show a PDF in a sandbox
    return Response(content, media_type=TYPES[path.suffix], headers=headers)
