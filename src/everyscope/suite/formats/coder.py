"""The coder that tensors of another project make, and what is done to them before; what they compute stays the same."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.metadata import SaeMetadata


def folded(weights: Path, tensors: Mapping[str, Tensor], known: SaeMetadata, *, top_k: int | None = None) -> Sae:
    """The coder of tensors in our names and layout, contiguous and float32; what is wrong with them names the file `weights`."""
    try:
        sae = from_tensors({name: tensor.float().contiguous() for name, tensor in tensors.items()}, known, top_k=top_k)
    except (ShapeMismatch, NonFinite) as error:
        raise type(error)(f"{weights}: {error}") from error
    if bool((sae.threshold < 0).any()):
        lowest = float(sae.threshold.min())
        raise DataError(
            f"{weights}: threshold has {lowest:.3g}, expected 0 or more everywhere; JumpReLU would keep negative values"
        )
    return sae


def without_subtraction(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that take x in place of x - b_dec: (x - b_dec) @ W_enc + b_enc = x @ W_enc + (b_enc - b_dec @ W_enc)."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return tensors | {"b_enc": (tensors["b_enc"].double() - shift).float()}


def in_units_of_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose latents are f_i |d_i| in place of f_i, for coders that choose the largest of those. Thresholds must be 0."""
    norms = tensors["W_dec"].double().norm(dim=1)
    whole = norms.masked_fill(norms == 0, 1)
    return tensors | {
        "W_enc": (tensors["W_enc"].double() * norms).float(),
        "b_enc": (tensors["b_enc"].double() * norms).float(),
        "W_dec": (tensors["W_dec"].double() / whole[:, None]).float(),
    }


def gated(W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> dict[str, Tensor]:
    """A gated SAE as JumpReLU (arXiv 2404.16014, section 3.2).

    Both branches are linear in u = x @ W_enc, so a threshold on the magnitude exp(r_mag) u + b_mag says where the gate
    u + b_gate > 0 is open: b_mag - exp(r_mag) b_gate, or 0 where that is less.
    """
    scale = r_mag.double().exp()
    threshold = (b_mag.double() - scale * b_gate.double()).clamp(min=0)
    W_enc = (W_enc.double() * scale).float()
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_mag, "b_dec": b_dec, "threshold": threshold.float()}


def with_subtraction(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back of `without_subtraction`, for formats that take b_dec from the input."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return tensors | {"b_enc": (tensors["b_enc"].double() + shift).float()}


def require_relu(sae: Sae, form: str) -> None:
    """ConfigError unless the coder is TopK of ReLU, without thresholds: what `form` can hold."""
    if sae.top_k is None or bool((sae.threshold != 0).any()):
        raise ConfigError(f"{form} holds TopK coders without thresholds; write this one in the format of SAELens or Gemma Scope")


def require_no_top_k(sae: Sae, form: str) -> None:
    """ConfigError for a TopK coder, which `form` cannot hold."""
    if sae.top_k is not None:
        raise ConfigError(f"{form} cannot say TopK; write this one in the format of SAELens or sparsify")


def require_sae(sae: Sae, form: str) -> None:
    """ConfigError for a transcoder, which `form` cannot hold."""
    if sae.is_transcoder:
        raise ConfigError(
            f"{form} holds SAEs alone; write this transcoder in the format of Gemma Scope, SAELens or circuit-tracer"
        )
