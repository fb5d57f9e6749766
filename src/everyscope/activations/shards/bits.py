"""Between torch tensors and the numpy arrays that carry their bits: numpy has no bfloat16."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from everyscope.activations.shards.format import CARRIER, TensorDtype

TORCH_DTYPE: dict[TensorDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}


def carrier_of(tensor: Tensor) -> np.ndarray:
    """A numpy window on the memory of a CPU tensor of one of the shards' dtypes; bfloat16 shows as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def reading_tensor(window: np.ndarray, dtype: TensorDtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over bytes (uint8 [bytes], contiguous) that may be a read-only map: copy from it, and keep `window` until then.

    By address, because torch.from_numpy warns of every array that cannot be written to.
    """
    if not window.size:
        return torch.empty(shape, dtype=TORCH_DTYPE[dtype])
    memory = (ctypes.c_uint8 * window.nbytes).from_address(window.ctypes.data)
    return torch.frombuffer(memory, dtype=TORCH_DTYPE[dtype]).view(shape)


def empty(shape: tuple[int, ...], dtype: TensorDtype) -> tuple[Tensor, np.ndarray]:
    """A new tensor, and its memory as a writable array in the carrier type."""
    tensor = torch.empty(shape, dtype=TORCH_DTYPE[dtype])
    window = carrier_of(tensor)
    assert window.dtype == CARRIER[dtype]
    return tensor, window
