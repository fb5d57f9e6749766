"""Which directions of one dictionary lie nearest to those of another, and how near they would lie by chance."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_COSINES = 1 << 24
"""Cosines held at once [numbers]; bounds memory at large widths."""
CHUNK_ROWS = 1 << 14
"""Random directions made at once [latents]."""

Null = Literal["isotropic", "covariance"]


def normalised_rows(directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """The directions at length 1, float32; a row of zeros stays one, and is near to nothing."""
    return torch.nn.functional.normalize(directions.float(), dim=1)


def nearest(
    narrow: Float[Tensor, "narrow d_in"], wide: Float[Tensor, "wide d_in"]
) -> tuple[Int64[Tensor, " wide"], Float[Tensor, " wide"]]:
    """For each wide direction, the narrow one of largest cosine and that cosine; a chunk of the matrix at a time.

    Both have unit rows; what is found lies on the CPU. Of equals the first counts.
    """
    rows = max(1, CHUNK_COSINES // len(narrow))
    best = [(chunk.to(narrow.device) @ narrow.T).max(dim=1) for chunk in wide.split(rows)]
    return torch.cat([found.indices for found in best]).cpu(), torch.cat([found.values for found in best]).clamp(-1, 1).cpu()


def random_directions(
    like: Float[Tensor, "wide d_in"], null: Null
) -> Callable[[int, torch.Generator], Float[Tensor, "num d_in"]]:
    """What draws so many random unit rows: isotropic, or of the Gaussian that has the mean and covariance of `like`'s rows."""
    d_in = like.shape[1]
    mean, root = torch.zeros(d_in, dtype=torch.float64), torch.eye(d_in, dtype=torch.float64)
    if null == "covariance":
        chunks = [chunk.cpu() for chunk in like.split(CHUNK_ROWS)]
        mean = sum((chunk.double().sum(0) for chunk in chunks), mean) / len(like)
        squares = sum(((chunk.double() - mean).T @ (chunk.double() - mean) for chunk in chunks), torch.zeros_like(root))
        variances, axes = torch.linalg.eigh(squares / len(like))
        root = variances.clamp(min=0).sqrt()[:, None] * axes.T

    def draw(num: int, generator: torch.Generator) -> Tensor:
        return normalised_rows(mean + torch.randn(num, d_in, generator=generator, dtype=torch.float64) @ root)

    return draw


def null_nearest(
    narrow: Float[Tensor, "narrow d_in"], wide: Float[Tensor, "wide d_in"], num: int, null: Null, seed: int
) -> tuple[Int64[Tensor, " num"], Float[Tensor, " num"]]:
    """`nearest` of `num` random directions: what chance gives a wide latent."""
    generator, draw = torch.Generator().manual_seed(seed), random_directions(wide, null)
    sizes = [min(CHUNK_ROWS, num - start) for start in range(0, num, CHUNK_ROWS)]
    best = [nearest(narrow, draw(size, generator)) for size in sizes]
    return torch.cat([parent for parent, _ in best]), torch.cat([cosine for _, cosine in best])


def p_values(cosines: Float[Tensor, " n"], null: Float[Tensor, " num"]) -> Float[Tensor, " n"]:
    """(1 + random latents at least as near) / (1 + random latents): never 0, for no draw excludes chance."""
    at_least = len(null) - torch.searchsorted(null.sort().values, cosines.contiguous(), side="left")
    return (1 + at_least.double()) / (1 + len(null))


MATCHED, SPLIT, NEW = "matched", "split", "new"


def relations(parent: Int64[Tensor, " wide"], cosine: Float[Tensor, " wide"], threshold: float) -> list[str]:
    """What each wide latent is: new (not above the threshold), matched (its parent's only child), or split (one of several)."""
    is_child = cosine > threshold
    children = torch.bincount(parent[is_child], minlength=int(parent.max()) + 1)
    return [
        NEW if not related else MATCHED if children[its] == 1 else SPLIT
        for its, related in zip(parent.tolist(), is_child.tolist(), strict=True)
    ]


def shares(relation: list[str]) -> dict[str, float]:
    """Share of each relation among all wide latents [1]."""
    return {name: relation.count(name) / len(relation) for name in (MATCHED, SPLIT, NEW)}
