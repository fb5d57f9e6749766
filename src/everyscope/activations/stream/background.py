"""Work beside the trainer in threads that never keep a process from ending: a pool's would be waited for, a deadline long."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def in_background(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> "Future[Result]":
    """Start `function` in a thread of its own; what it gives or raises is in the future. Callers bound how many there are."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # raised where the result is read
            future.set_exception(error)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    return future
