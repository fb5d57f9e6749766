"""An answer that is sent while the model works on it: JSON lines as server-sent events, which nothing on the way holds back.

Errors before the first line are answers with a status, as everywhere; later ones are a last line with `error`. Work ends as soon
as its client has left, whichever way the server notices that.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from everyscope.base.errors import EveryscopeError
from everyscope.browse.live import Asking

WATCH_SECONDS = 0.2
"""How often a request that waits for the model is looked after: its client may have left [s]."""
Line = dict[str, Any]
Say = Callable[[Line], None]


async def until_left(request: Request, asking: Asking, *awaited: Awaitable[Any]) -> None:
    """Wait until one of `awaited` is done; give the work up once the client has left."""
    futures = [asyncio.ensure_future(one) for one in awaited]
    try:
        while not (await asyncio.wait(futures, timeout=WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED))[0]:
            if await request.is_disconnected():
                asking.give_up()
    except asyncio.CancelledError:
        asking.give_up()
        raise


async def streamed(work: Callable[[Say], None], request: Request, asking: Asking, threads: Executor) -> "Streamed":
    """The answer that `work` says line by line in one of `threads`; raises what it raises before its first line."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[Line] = asyncio.Queue()

    def say(line: Line) -> None:
        loop.call_soon_threadsafe(lines.put_nowait, line)

    running = loop.run_in_executor(threads, work, say)
    running.add_done_callback(lambda done: done.cancelled() or done.exception())  # whatever it is, someone has asked for it
    first = asyncio.ensure_future(lines.get())
    await until_left(request, asking, running, first)
    if not first.done():
        try:
            await running
        finally:
            if lines.empty() and not first.done():
                first.cancel()
    return Streamed(_events(running, first, lines), asking)


async def _events(
    running: "asyncio.Future[None]", first: "asyncio.Future[Line]", lines: "asyncio.Queue[Line]"
) -> AsyncIterator[str]:
    line = first
    while True:
        await asyncio.wait([running, line], return_when=asyncio.FIRST_COMPLETED)
        if not line.done() and lines.empty():  # what was said last is in the queue before the work is done
            line.cancel()
            break
        yield _event(await line)
        line = asyncio.ensure_future(lines.get())
    try:
        await running
    except EveryscopeError as error:
        yield _event({"error": str(error)})


def _event(line: Line) -> str:
    return f"data: {json.dumps(line)}\n\n"


class Streamed(StreamingResponse):
    """Sends lines; gives the work up when the client leaves."""

    def __init__(self, events: AsyncIterator[str], asking: Asking) -> None:
        """Of `events`, which `asking` makes."""
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._asking = asking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all; however that ends, nothing is asked of the model afterwards."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asking.give_up()
