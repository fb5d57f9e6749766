"""A rank of a mesh whose others are silent."""

import torch

from everyscope.sae.mesh import AXES, Axis, Mesh


class Counting:
    """One rank of a mesh whose others are silent: what it would sum is counted, and stays what it is."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.bytes = mesh, dict.fromkeys(AXES, 0)

    def sum_(self, tensor: torch.Tensor, axis: Axis) -> None:
        if len(self.mesh.members(axis)) > 1:
            self.bytes[axis] += tensor.nbytes

    def barrier(self) -> None:
        pass
