"""A web server on this machine that serves a folder by ranges, and misbehaves when told to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Reply = Callable[[BaseHTTPRequestHandler, bytes, int, int], None]
"""Answers a request for bytes [start, stop) of a file's data in its own way."""


def good(request: BaseHTTPRequestHandler, data: bytes, start: int, stop: int) -> None:
    """What a server should send."""
    is_range = "Range" in request.headers
    request.send_response(206 if is_range else 200)
    if is_range:
        request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    request.send_header("Content-Length", str(stop - start))
    request.end_headers()
    request.wfile.write(data[start:stop])


def without_ranges(request: BaseHTTPRequestHandler, data: bytes, start: int, stop: int) -> None:
    """The whole file, whatever was asked for."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def truncated(request: BaseHTTPRequestHandler, data: bytes, start: int, stop: int) -> None:
    """Less than announced."""
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    request.send_header("Content-Length", str(stop - start))
    request.end_headers()
    request.wfile.write(data[start : (start + stop) // 2])


def flipped(request: BaseHTTPRequestHandler, data: bytes, start: int, stop: int) -> None:
    """One bit of another value."""
    good(request, data[: stop - 1] + bytes([data[stop - 1] ^ 1]) + data[stop:], start, stop)


def shifted(request: BaseHTTPRequestHandler, data: bytes, start: int, stop: int) -> None:
    """Another range than asked for, and it says so."""
    good(request, data, start + 1, stop)


def failing(code: int) -> Reply:
    """An error."""
    return lambda request, data, start, stop: request.send_error(code)


class Web:
    """The server: `replies` says for shards, one request after another, how to answer; then all is good."""

    def __init__(self, root: Path) -> None:
        self.root, self.replies, self.requests = root, iter(()), []
        self.address = ""

    def misbehave(self, *replies: Reply) -> None:
        self.replies = iter(replies)


@contextmanager
def serving(root: Path) -> Iterator[Web]:
    web = Web(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = web.root / self.path.lstrip("/")
            web.requests.append((self.path, self.headers.get("Range")))
            if not path.is_file():
                self.send_error(404)
                return
            data, asked = path.read_bytes(), self.headers.get("Range")
            start, stop = 0, len(data)
            if asked is not None:
                first, last = asked.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last) + 1, len(data))
                if start >= len(data):
                    self.send_error(416)
                    return
            reply = next(web.replies, good) if path.suffix == ".safetensors" else good
            reply(self, data, start, stop)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    web.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
