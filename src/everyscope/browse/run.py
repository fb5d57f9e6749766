"""Serving a suite's pages on this machine alone, until Ctrl-C."""

import os
import socket
import sys
import threading
import webbrowser
from contextlib import suppress

import uvicorn

from everyscope.base.errors import ConfigError
from everyscope.base.progress import printable, say
from everyscope.browse.app import Browser
from everyscope.browse.config import BrowseConfig
from everyscope.browse.live import LiveFactory
from everyscope.browse.patience import Patient
from everyscope.browse.preparation import Preparation

HOST, PORT = "127.0.0.1", 8017
SWITCH_SECONDS = 0.0005
"""After which a thread lets another have the interpreter: a page takes it dozens of times beside a model that works [s]."""
MAX_CONNECTIONS = 256
"""Connections and requests at once; more get 503."""


def run(config: BrowseConfig, live: LiveFactory | None = None) -> None:
    """Serve until interrupted; `live` makes the language model when a page first needs it.

    The server answers at once; a page whose part of the index is missing says how far that is. ConfigError or DataError where
    there is no suite, ConfigError where the port is taken.
    """
    preparation = Preparation(config.suite, config.cache)
    listener = listen(config.port)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    server = uvicorn.Server(
        uvicorn.Config(
            Browser(preparation, live).app(),
            http=Patient,
            log_level="error",
            lifespan="off",
            access_log=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
    )
    if not preparation.is_built:
        say("Indexing the suite SAE by SAE; the first page is available at once")
    threading.Thread(target=_report, args=(preparation,), daemon=True).start()
    sys.setswitchinterval(SWITCH_SECONDS)
    print(f"{printable(preparation.title)}: {address}", flush=True)
    say("Ctrl-C ends it")
    if config.open and has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with listener, suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _report(preparation: Preparation) -> None:
    preparation.start().join()
    if preparation.error:
        say(f"everyscope: {preparation.error}")


def listen(port: int | None) -> socket.socket:
    """A listening socket on 127.0.0.1: at `port`, or for None at ours and, where that is taken, at any that is free."""
    for wanted in (PORT, 0) if port is None else (port,):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # On Windows this option would share the port with its present owner; elsewhere it only skips the wait after a close.
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted))
        except OSError as error:
            listener.close()
            refusal = error
            continue
        listener.listen(128)
        return listener
    raise ConfigError(f"port {port}: is unavailable ({refusal.strerror}); choose another with --port, or 0 for any that is free")


def has_screen() -> bool:
    """Whether a web browser would be seen: without a screen some systems open one inside the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
