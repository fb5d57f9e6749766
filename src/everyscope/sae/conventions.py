"""Between the two forms in which transcoders take what an MLP reads: behind its norm without the norm's gain, and with it.

With x_B = gain * x_A + bias, coordinate by coordinate, x_B @ W = x_A @ (diag(gain) W) + bias @ W: the gain goes into the rows of
W_enc and W_skip, the bias into b_enc and b_dec. The third form, the residual stream before the norm, has no such map.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import InputConvention


def to_convention(
    coder: Sae,
    convention: InputConvention,
    gain: Float[Tensor, " d_in"],
    bias: Float[Tensor, " d_in"] | None = None,
) -> Sae:
    """The transcoder that computes the same from inputs of another form; float64 inside, in the dtype that `coder` has.

    `gain` is what the norm multiplies by (in Gemma 1 + weight), `bias` what a LayerNorm adds: see `sites.norms.mlp_norm_of`.
    ConfigError where a form is not known, is the residual stream, or would need a division by a gain of zero; ShapeMismatch for a
    gain of another size.
    """
    own = coder.metadata.convention
    if own == convention:
        return coder
    if {own, convention} != {"normalised", "mlp_input"}:
        raise ConfigError(f"a transcoder that takes {own!r} cannot take {convention!r}: only normalised and mlp_input convert")
    if gain.shape != (coder.d_in,):
        raise ShapeMismatch(f"gain has shape {tuple(gain.shape)}, expected ({coder.d_in},): is it of another model?")
    gain = gain.to(coder.device).double()
    bias = gain.new_zeros(coder.d_in) if bias is None else bias.to(coder.device).double()
    if own == "normalised":  # x_A = (x_B - bias) / gain
        if not bool((gain != 0).all()):
            raise ConfigError("gain is 0 in places, where nothing of the normalised input can be recovered from mlp_input")
        gain, bias = 1 / gain, -bias / gain
    W_enc = coder.W_enc.double()
    changed = {"W_enc": gain[:, None] * W_enc, "b_enc": coder.b_enc.double() + bias @ W_enc}
    if coder.W_skip is not None:
        w_skip = coder.W_skip.double()
        changed |= {"W_skip": gain[:, None] * w_skip, "b_dec": coder.b_dec.double() + bias @ w_skip}
    metadata = replace(coder.metadata, convention=convention)
    return coder.with_tensors(metadata, **{name: tensor.to(coder.dtype).contiguous() for name, tensor in changed.items()})
