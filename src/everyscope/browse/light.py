"""Answers made light: compressed, and not sent again to a browser that has them.

Only whole answers are touched: what is streamed goes through as it comes, piece by piece. (Starlette's own compression would keep
a stream's pieces back until they fill its buffer.)
"""

import gzip
import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAST = 1000
"""Smaller answers are not compressed [bytes]."""
LEVEL = 4
"""Of compression: a page of 600 KB takes some 5 ms, and is a tenth of its size."""
TEXTS = ("text/", "application/json", "image/svg+xml")


class Light:
    """Compresses whole answers, gives them an ETag, and answers 304 to who has one."""

    def __init__(self, app: ASGIApp) -> None:
        """Around `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, lightly."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        asked, start = Headers(scope=scope), None

        async def send_lightly(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if message.get("more_body"):
                    head: Message | None = start
                else:
                    head, message = lightened(asked, start, message)
                start = None
                await send(head)
            await send(message)

        await self._app(scope, receive, send_lightly)


def lightened(asked: Headers, start: Message, message: Message) -> tuple[Message, Message]:
    """The two messages of a whole answer to a request with the headers `asked`, as they are sent."""
    headers, body = MutableHeaders(raw=start["headers"]), message.get("body", b"")
    if start["status"] != 200 or "no-store" in headers.get("cache-control", "") or not body:
        return start, message
    tag = f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    headers.setdefault("etag", tag)
    headers.setdefault("cache-control", "no-cache")  # kept by the browser, and asked for again with its tag
    headers.add_vary_header("accept-encoding")
    if tag in asked.get("if-none-match", ""):
        headers["content-length"] = "0"
        return {**start, "status": 304, "headers": headers.raw}, {**message, "body": b""}
    is_text = headers.get("content-type", "").startswith(TEXTS)
    if is_text and len(body) >= LEAST and "gzip" in asked.get("accept-encoding", ""):
        body = gzip.compress(body, LEVEL, mtime=0)
        headers["content-encoding"], headers["content-length"] = "gzip", str(len(body))
    return {**start, "headers": headers.raw}, {**message, "body": body}
