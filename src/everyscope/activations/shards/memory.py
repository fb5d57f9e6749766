"""Memory that is used again as soon as nobody holds it: to have new pages from the system takes longer than to fill them."""

import mmap
import threading
import weakref

import numpy as np
from jaxtyping import UInt8


class RecycledMemory:
    """Gives out memory; that of an array which is gone, with all views of it and all tensors over it, is given out again.

    There is never more than what was held at once and what is held now. Several threads may use it.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._pieces: list[tuple[mmap.mmap, weakref.ref[np.ndarray]]] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> UInt8[np.ndarray, " num_bytes"]:
        """Memory that nobody else holds; what is in it is left over."""
        with self._lock:
            return self._taken(num_bytes)

    def _taken(self, num_bytes: int) -> UInt8[np.ndarray, " num_bytes"]:
        fitting = [
            (len(piece), number)
            for number, (piece, window) in enumerate(self._pieces)
            if window() is None and num_bytes <= len(piece) <= 2 * num_bytes
        ]
        if fitting:
            piece, _ = self._pieces.pop(min(fitting)[1])
        else:
            self._pieces = [(piece, window) for piece, window in self._pieces if window() is not None]
            piece = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Views of an array over an mmap hold that array itself, and not what is below it: so one reference counts for all.
        window = np.frombuffer(piece, np.uint8, num_bytes)
        self._pieces.append((piece, weakref.ref(window)))
        return window
