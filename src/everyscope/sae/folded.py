"""A finished SAE or transcoder: raw activations in, a raw reconstruction or prediction out.

The training-time normalisation is folded into the tensors (Gemma Scope, arXiv 2408.05147, appendix A), so that users need no
constant and subtract no b_dec. An SAE is the coder that writes the place it reads; a transcoder writes another one, of size
d_out, and may have an affine skip beside its latents.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everyscope.base.errors import ConfigError, NonFinite, ShapeMismatch
from everyscope.sae.functional import decode, jumprelu, largest, pre_activations
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.saelens import saelens_config, write_saelens

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
"""Names of the five tensors that every coder has, here and in files."""
SKIP = "W_skip"
"""Name of the sixth, the affine skip of some transcoders; [d_in, d_out] here, in row vectors x @ W_skip."""


class Sae(nn.Module):
    """A folded JumpReLU coder. Row vectors: f = JumpReLU(x @ W_enc + b_enc), y_hat = f @ W_dec + b_dec + x @ W_skip.

    Of an SAE y_hat reconstructs x and there is no W_skip; of a transcoder it predicts `metadata.target`, and W_skip may be None.
    A module of torch.nn: it moves with `to(device, dtype)`, in place, stands in other modules, and lets gradients through. Its
    parameters are frozen until `requires_grad_()`; the threshold gets no gradient.
    """

    W_enc: Float[nn.Parameter, "d_in d_sae"]
    W_dec: Float[nn.Parameter, "d_sae d_out"]
    b_enc: Float[nn.Parameter, " d_sae"]
    b_dec: Float[nn.Parameter, " d_out"]
    threshold: Float[nn.Parameter, " d_sae"]
    W_skip: Float[nn.Parameter, "d_in d_out"] | None

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_out"],
        threshold: Float[Tensor, " d_sae"],
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        *,
        metadata: SaeMetadata | None = None,
        top_k: int | None = None,
    ) -> None:
        """Take the tensors as they are, without a copy.

        With `top_k`, of the latents above their thresholds only so many are kept, the largest: TopK SAEs, which others release.

        ShapeMismatch where they do not fit together, as an SAE's d_out that is not its d_in, and for a skip where `metadata` does
        not say that it is a transcoder; NonFinite where one holds NaN or infinity.
        """
        super().__init__()
        if W_enc.ndim != 2 or 0 in W_enc.shape:
            raise ShapeMismatch(f"W_enc has shape {tuple(W_enc.shape)}, expected [d_in, d_sae] with at least one of each")
        self.metadata = metadata or SaeMetadata()
        if W_skip is not None and not self.is_transcoder:
            raise ShapeMismatch("W_skip was given for an SAE; only transcoders have one: metadata=SaeMetadata(kind='transcoder')")
        d_in, d_sae = W_enc.shape
        d_out = W_dec.shape[1] if self.is_transcoder and W_dec.ndim == 2 else d_in
        want = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}
        found = dict(zip(PARAMETERS, (W_enc, W_dec, b_enc, b_dec, threshold), strict=True))
        for name, tensor in (found if W_skip is None else found | {SKIP: W_skip}).items():
            if tuple(tensor.shape) != (wanted := want.get(name, (d_in, d_out))):
                raise ShapeMismatch(
                    f"{name} has shape {tuple(tensor.shape)}, expected {wanted} beside W_enc of {(d_in, d_sae)}; "
                    "is a tensor transposed, or of another SAE?"
                )
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{name} holds NaN or infinity; the SAE is damaged or its training diverged")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        if W_skip is None:
            self.register_parameter(SKIP, None)
        if top_k is not None and not 0 < top_k <= d_sae:
            raise ShapeMismatch(f"top_k={top_k} of {d_sae} latents; expected 1 to {d_sae}")
        self.top_k = top_k

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another place than the one it reads."""
        return self.metadata.is_transcoder

    @property
    def d_in(self) -> int:
        """Size of the activations that it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Size of the activations that it writes; an SAE's d_in."""
        return self.W_dec.shape[1]

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
        f = jumprelu(pre_activations(x.to(self.dtype), self.W_enc, self.b_enc), self.threshold)
        return f if self.top_k is None else largest(f, self.top_k)

    def decode(
        self, f: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """The raw reconstruction from latent activations; with a skip, also from the `x` that they encode.

        ConfigError where there is a skip and no `x` is given.
        """
        y_hat = decode(f, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return y_hat
        if x is None:
            raise ConfigError("this transcoder has a skip, which its latents do not hold; pass what it reads: decode(f, x)")
        return y_hat + x.to(self.dtype) @ self.W_skip

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of raw activations, or the prediction from them, in the dtype of `x`."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors by name, and W_skip where there is one, contiguous and float32 on the CPU."""
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.own_tensors().items()}

    def own_tensors(self) -> dict[str, Tensor]:
        """The same as they are."""
        return {name: getattr(self, name) for name in (*PARAMETERS, *(() if self.W_skip is None else (SKIP,)))}

    def with_tensors(self, metadata: SaeMetadata | None = None, **tensors: Tensor) -> "Sae":
        """The same coder with some tensors, by name, in place of its own."""
        return Sae(**(self.own_tensors() | tensors), metadata=metadata or self.metadata, top_k=self.top_k)

    def save(self, folder: str | Path) -> None:
        """Write the SAE into `folder`, in float32 and the format that `load_sae` and SAELens read, with what metadata says."""
        config = saelens_config(self.d_in, self.d_sae, self.metadata, d_out=self.d_out, top_k=self.top_k)
        write_saelens(Path(folder), self.tensors(), config)

    def __repr__(self) -> str:
        known, kind = self.metadata, "Transcoder" if self.is_transcoder else "Sae"
        place = known.coder_site or known.site
        where = [str(place)] if place is not None else []
        where += [f"of {known.model}"] if known.model is not None else []
        sizes = [f"d_in={self.d_in}", *([f"d_out={self.d_out}"] if self.d_out != self.d_in else []), f"d_sae={self.d_sae}"]
        sizes += ["skip"] if self.W_skip is not None else []
        sizes += [] if self.top_k is None else [f"TopK {self.top_k}"]
        sizes += [] if known.l0 is None else [f"L0={known.l0:.4g}"]
        sizes += ([] if self.dtype == torch.float32 else [str(self.dtype)]) + (
            [] if self.device.type == "cpu" else [str(self.device)]
        )
        return f"{kind}({' '.join(where)}{': ' if where else ''}{', '.join(sizes)})"


def save_sae(sae: Sae, folder: str | Path) -> None:
    """Write an SAE into `folder`, as `sae.save(folder)` does; `load_sae` and SAELens read it."""
    sae.save(folder)


def from_tensors(tensors: dict[str, Tensor], metadata: SaeMetadata | None = None, *, top_k: int | None = None) -> Sae:
    """The coder whose tensors are in `tensors` by name; ShapeMismatch where one of the five is missing."""
    missing = [name for name in PARAMETERS if name not in tensors]
    if missing:
        raise ShapeMismatch(f"no tensor named {', '.join(missing)} among {sorted(tensors)}; this is no JumpReLU SAE file")
    return Sae(*(tensors[name] for name in PARAMETERS), W_skip=tensors.get(SKIP), metadata=metadata, top_k=top_k)
