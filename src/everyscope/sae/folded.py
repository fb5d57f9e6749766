"""A finished SAE: raw activations in, raw reconstruction out.

The training-time normalisation is folded into biases and threshold (Gemma Scope, arXiv 2408.05147, appendix A), so that
whoever uses it needs no constant and subtracts no b_dec.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.base.errors import NonFinite, ShapeMismatch
from everyscope.sae.functional import decode, jumprelu, pre_activations

PARAMETERS = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
"""Our names of the five tensors, and their names in files."""


@dataclass(frozen=True)
class Sae:
    """A folded JumpReLU SAE. Row vectors: f = JumpReLU(x @ w_enc + b_enc), x_hat = f @ w_dec + b_dec."""

    w_enc: Float[Tensor, "d_in d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]

    def __post_init__(self) -> None:
        """ShapeMismatch where the five tensors do not fit together, NonFinite where one holds NaN or infinity."""
        if self.w_enc.ndim != 2 or 0 in self.w_enc.shape:
            raise ShapeMismatch(f"W_enc has shape {tuple(self.w_enc.shape)}, expected [d_in, d_sae] with at least one of each")
        d_in, d_sae = self.w_enc.shape
        want = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
        for name, shape in want.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ShapeMismatch(
                    f"{PARAMETERS[name]} has shape {tuple(tensor.shape)}, expected {shape} beside W_enc of {(d_in, d_sae)}; "
                    "is a tensor transposed, or of another SAE?"
                )
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{PARAMETERS[name]} holds NaN or infinity; the SAE is damaged or its training diverged")

    @property
    def d_in(self) -> int:
        """Size of the activations."""
        return self.w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents, the SAE's width."""
        return self.w_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of raw activations, in raw units; ShapeMismatch for another d_in."""
        if x.shape[-1] != self.d_in:
            raise ShapeMismatch(
                f"activations have d_in={x.shape[-1]}, the SAE expects {self.d_in}; is this the SAE of another site?"
            )
        x = x.to(self.w_enc.dtype)
        return jumprelu(pre_activations(x, self.w_enc, self.b_enc), self.threshold)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The raw reconstruction from latent activations."""
        return decode(f, self.w_dec, self.b_dec)

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of raw activations, in the dtype of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)

    def to(self, target: torch.device | torch.dtype | str) -> "Sae":
        """The same SAE on another device or in another number format."""
        return Sae(*(getattr(self, field.name).to(target) for field in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors under the names that files use, contiguous and float32 on the CPU."""
        return {name: getattr(self, ours).detach().float().cpu().contiguous() for ours, name in PARAMETERS.items()}


def from_tensors(tensors: dict[str, Tensor]) -> Sae:
    """The SAE whose five tensors are in `tensors` under the names that files use; ShapeMismatch where one is missing."""
    missing = [name for name in PARAMETERS.values() if name not in tensors]
    if missing:
        raise ShapeMismatch(f"no tensor named {', '.join(missing)} among {sorted(tensors)}; this is no JumpReLU SAE file")
    return Sae(**{ours: tensors[name] for ours, name in PARAMETERS.items()})
