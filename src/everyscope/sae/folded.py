"""A finished SAE: raw activations in, raw reconstruction out.

The training-time normalisation is folded into biases and threshold (Gemma Scope, arXiv 2408.05147, appendix A), so that
users need no constant and subtract no b_dec.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everyscope.base.errors import NonFinite, ShapeMismatch
from everyscope.sae.functional import decode, jumprelu, pre_activations
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.saelens import saelens_config, write_saelens

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
"""Names of the five tensors, here and in files."""


class Sae(nn.Module):
    """A folded JumpReLU SAE. Row vectors: f = JumpReLU(x @ W_enc + b_enc), x_hat = f @ W_dec + b_dec.

    A module of torch.nn: it moves with `to(device, dtype)`, in place, stands in other modules, and lets gradients through. Its
    parameters are frozen until `requires_grad_()`; the threshold gets no gradient.
    """

    W_enc: Float[nn.Parameter, "d_in d_sae"]
    W_dec: Float[nn.Parameter, "d_sae d_in"]
    b_enc: Float[nn.Parameter, " d_sae"]
    b_dec: Float[nn.Parameter, " d_in"]
    threshold: Float[nn.Parameter, " d_sae"]

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],  # noqa: N803 - as the field writes them
        W_dec: Float[Tensor, "d_sae d_in"],  # noqa: N803
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"],
        threshold: Float[Tensor, " d_sae"],
        *,
        metadata: SaeMetadata | None = None,
    ) -> None:
        """Take the tensors as they are, without a copy.

        ShapeMismatch where the five do not fit together, NonFinite where one holds NaN or infinity.
        """
        super().__init__()
        if W_enc.ndim != 2 or 0 in W_enc.shape:
            raise ShapeMismatch(f"W_enc has shape {tuple(W_enc.shape)}, expected [d_in, d_sae] with at least one of each")
        d_in, d_sae = W_enc.shape
        want = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
        for name, tensor in zip(PARAMETERS, (W_enc, W_dec, b_enc, b_dec, threshold), strict=True):
            if tuple(tensor.shape) != want[name]:
                raise ShapeMismatch(
                    f"{name} has shape {tuple(tensor.shape)}, expected {want[name]} beside W_enc of {(d_in, d_sae)}; "
                    "is a tensor transposed, or of another SAE?"
                )
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{name} holds NaN or infinity; the SAE is damaged or its training diverged")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.metadata = metadata or SaeMetadata()

    @property
    def w_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """W_enc, as formulas in this package write it."""
        return self.W_enc

    @property
    def w_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """W_dec, as formulas in this package write it."""
        return self.W_dec

    @property
    def d_in(self) -> int:
        """Size of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents, the SAE's width."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the tensors."""
        return self.W_enc.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of raw activations, in raw units; ShapeMismatch for another d_in or another device."""
        if not isinstance(x, Tensor):
            raise ShapeMismatch(f"activations are of type {type(x).__name__}, expected a tensor; torch.as_tensor(x) makes one")
        if x.shape[-1] != self.d_in:
            raise ShapeMismatch(
                f"activations have d_in={x.shape[-1]}, the SAE expects {self.d_in}; is this the SAE of another site?"
            )
        if x.device != self.device:
            raise ShapeMismatch(f"activations are on {x.device}, the SAE on {self.device}; move it: sae.to({str(x.device)!r})")
        return jumprelu(pre_activations(x.to(self.dtype), self.W_enc, self.b_enc), self.threshold)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The raw reconstruction from latent activations."""
        return decode(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of raw activations, in the dtype of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors by name, contiguous and float32 on the CPU."""
        return {name: getattr(self, name).detach().float().cpu().contiguous() for name in PARAMETERS}

    def save(self, folder: str | Path) -> None:
        """Write the SAE into `folder`, in float32 and the format that `load_sae` and SAELens read, with what metadata says."""
        write_saelens(Path(folder), self.tensors(), saelens_config(self.d_in, self.d_sae, self.metadata))

    def __repr__(self) -> str:
        known = self.metadata
        where = [str(known.site)] if known.site is not None else []
        where += [f"of {known.model}"] if known.model is not None else []
        sizes = [f"d_in={self.d_in}", f"d_sae={self.d_sae}"] + ([] if known.l0 is None else [f"L0={known.l0:.4g}"])
        sizes += ([] if self.dtype == torch.float32 else [str(self.dtype)]) + (
            [] if self.device.type == "cpu" else [str(self.device)]
        )
        return f"Sae({' '.join(where)}{': ' if where else ''}{', '.join(sizes)})"


def save_sae(sae: Sae, folder: str | Path) -> None:
    """Write an SAE into `folder`, as `sae.save(folder)` does; `load_sae` and SAELens read it."""
    sae.save(folder)


def from_tensors(tensors: dict[str, Tensor], metadata: SaeMetadata | None = None) -> Sae:
    """The SAE whose five tensors are in `tensors` by name; ShapeMismatch where one is missing."""
    missing = [name for name in PARAMETERS if name not in tensors]
    if missing:
        raise ShapeMismatch(f"no tensor named {', '.join(missing)} among {sorted(tensors)}; this is no JumpReLU SAE file")
    return Sae(*(tensors[name] for name in PARAMETERS), metadata=metadata)
