"""Memory for batches that is used again as soon as nobody holds it: new pages cost as much as filling them."""

import weakref

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class RecycledMemory:
    """Gives out float32 tensors of one shape; memory of a tensor that is gone, with all views of it, is given out again.

    There are never more pieces than tensors that were alive at once. For use by one thread at a time.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._shape = (0, 0)
        self._pieces: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """A tensor that nobody else holds; what is in it is left over."""
        if (rows, columns) != self._shape:
            self._shape, self._pieces = (rows, columns), []
        free = next((number for number, (_, held) in enumerate(self._pieces) if held() is None), None)
        memory = np.empty((rows, columns), np.float32) if free is None else self._pieces.pop(free)[0]
        # The tensor holds this window for as long as its memory lives, and nothing but the tensor does.
        window = memory.view()
        self._pieces.append((memory, weakref.ref(window)))
        return torch.from_numpy(window)
