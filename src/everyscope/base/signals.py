"""Being asked to stop: SIGTERM, as a cluster sends it before it takes a machine away, or Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from everyscope.base.progress import say

EXIT_CODE = 128 + signal.SIGTERM
"""What a process that was asked to stop, and did, exits with; shells report the same for one that the signal killed."""


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C no longer end the process; the function yielded says whether one has come.

    A second Ctrl-C ends it at once. Where Ctrl-C was pressed, SystemExit leaves the block as KeyboardInterrupt. Only a main
    thread hears signals: in any other the function stays False and nothing changes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    is_interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            raise KeyboardInterrupt
        is_interrupted = True
        asked.set()
        say("  stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    at_interrupt = signal.getsignal(signal.SIGINT)
    if at_interrupt is signal.default_int_handler:  # not where our parent decides about Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked.is_set
    except SystemExit as leaving:
        if is_interrupted and leaving.code == EXIT_CODE:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if at_interrupt is signal.default_int_handler:
            signal.signal(signal.SIGINT, at_interrupt)


def leave_on_termination() -> None:
    """Let SIGTERM end this process as Ctrl-C does: by an exception, so that what is under way is put in order first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)
