"""sparsify's TopK SAE: its SparseCoder and default optimiser, in the order of its Trainer, which itself needs a language model.

Its loss is the FVU of a batch, its L0 is k: a yardstick of speed more than the same SAE.
"""

# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
# The package is in an environment of its own (peers/launch.py), and pyright takes this file for it.

import os

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels are CUDA's; read when it is imported

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from peers.worker import Rows, Settings, serve


class Sparsify:
    """SparseCoder with signum made schedule-free, sparsify's default."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        """A new SAE; `lr` is a knob, its default depends on the width as in sparsify's Trainer."""
        config = SparseCoderConfig(num_latents=settings.width, k=round(settings.l0))
        self._sae = SparseCoder(rows.d_in, config, dtype=torch.float32)
        rate = settings.knobs.get("lr", 5e-3 / (settings.width / 2**14) ** 0.5)
        self._optimiser = ScheduleFreeWrapper(SignSGD([{"params": self._sae.parameters(), "lr": rate}]), momentum=0.95)
        self._optimiser.train()
        self._since_fired = torch.zeros(settings.width, dtype=torch.long)
        self._is_new = True

    def step(self, rows: Tensor) -> None:
        """Unit decoder, loss, backward, projection, optimiser, and the count by which it knows dead latents."""
        if self._is_new:
            self._sae.b_dec.data = rows.mean(0)
            self._is_new = False
        self._sae.set_decoder_norm_to_unit_norm()
        out = self._sae(rows, total_variance=(rows - rows.mean(0)).pow(2).sum())
        fired = torch.zeros_like(self._since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._since_fired += len(rows)
        self._since_fired[fired] = 0

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """At the averaged weights, which its optimiser swaps in for evaluation."""
        self._optimiser.eval()
        out = self._sae(rows)
        f = torch.zeros(len(rows), self._sae.num_latents).scatter_(1, out.latent_indices, out.latent_acts)
        self._optimiser.train()
        return out.sae_out, f

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """Its k."""
        self._sae.cfg.k = round(l0)


if __name__ == "__main__":
    serve(Sparsify, "eai-sparsify")
