"""Being asked to stop: SIGTERM, as a cluster sends it before it takes a machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
"""What a process that was asked to stop, and did, exits with; shells report the same for one that the signal killed."""


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM no longer ends the process; the function yielded tells whether it has come.

    Only a main thread hears signals: in any other the function stays False and nothing changes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_on_termination() -> None:
    """Let SIGTERM end this process as Ctrl-C does: by an exception, so that what is under way is put in order first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)
