"""Where each latent fires on some rows, latent after latent: on a CPU straight from the pre-activations, without dense codes."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from everyscope.base.errors import NonFinite
from everyscope.sae.folded import Sae
from everyscope.sae.functional import pre_activations
from everyscope.sae.kernels.cpu_codes import count_firings, list_firings


class RowFirings(NamedTuple):
    """The firings of an SAE on some rows, latent after latent, and each latent's by row."""

    starts: Int64[np.ndarray, " d_sae_plus_1"]
    """Where each latent's firings begin; the last entry is their number."""
    rows: Int64[np.ndarray, " firings"]
    values: Float32[np.ndarray, " firings"]
    """Activations in raw units, > 0."""


@torch.no_grad()
def firings_by_latent(sae: Sae, x: Float[Tensor, "n d_in"]) -> RowFirings:
    """What `sae.encode(x)` holds but zeros, `x` on its device; NonFinite for NaN or infinity."""
    if sae.device.type == "cpu" and sae.dtype == torch.float32 and sae.top_k is None:
        return _from_pre_activations(sae, x.float())
    f = sae.encode(x)
    latent, row = f.T.contiguous().nonzero(as_tuple=True)  # NaN is not zero either
    values = f[row, latent].float()
    _refuse_unless(bool(torch.isfinite(values).all()), len(f))
    return RowFirings(_starts(torch.bincount(latent, minlength=sae.d_sae).cpu().numpy()), row.cpu().numpy(), values.cpu().numpy())


def _from_pre_activations(sae: Sae, x: Float[Tensor, "n d_in"]) -> RowFirings:
    pre, level = pre_activations(x, sae.W_enc, sae.b_enc).numpy(), sae.threshold.clamp(min=0).numpy()
    counts = np.zeros(sae.d_sae, np.int64)
    _refuse_unless(count_firings(pre, level, counts), len(pre))
    starts = _starts(counts)
    rows, values = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.float32)
    list_firings(pre, level, starts[:-1].copy(), rows, values)
    return RowFirings(starts, rows, values)


def _starts(counts: Int64[np.ndarray, " d_sae"]) -> Int64[np.ndarray, " d_sae_plus_1"]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _refuse_unless(is_finite: bool, num_rows: int) -> None:
    if not is_finite:
        raise NonFinite(f"NaN or infinity among the latents of {num_rows} rows; is the model in a format too short for it?")
