"""Between torch tensors and the numpy arrays that carry their bits: numpy has no bfloat16."""

import numpy as np
import torch
from torch import Tensor

from everyscope.shards.format import CARRIER, TensorDtype

TORCH_DTYPE: dict[TensorDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}


def carrier_of(tensor: Tensor) -> np.ndarray:
    """A numpy window on the memory of a CPU tensor of one of the shards' dtypes; bfloat16 shows as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def empty(shape: tuple[int, ...], dtype: TensorDtype) -> tuple[Tensor, np.ndarray]:
    """A new tensor, and its memory as a writable array in the carrier type."""
    tensor = torch.empty(shape, dtype=TORCH_DTYPE[dtype])
    window = carrier_of(tensor)
    assert window.dtype == CARRIER[dtype]
    return tensor, window
