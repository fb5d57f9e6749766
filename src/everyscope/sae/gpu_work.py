"""One bfloat16 step of one SAE on a GPU, from rows to the update, in memory that all SAEs of the same shapes share.

Nothing here depends on a number of the host that changes from step to step, and nothing waits for the device, so that the whole
may be recorded once and replayed.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.across_ranks import largest
from everyscope.sae.gpu_limits import ROUNDED_SEGMENT
from everyscope.sae.kernels.gpu import count_marks, decode_errors
from everyscope.sae.kernels.gpu_bf16 import list_pairs, mark_pairs, product
from everyscope.sae.kernels.gpu_bf16_dense import activate, differentiate
from everyscope.sae.kernels.gpu_bf16_update import Batch, Lists, Segments, Weights, sum_segments
from everyscope.sae.kernels.gpu_triton import blocks
from everyscope.sae.mesh import Collective
from everyscope.sae.trainable import TrainableSae


@dataclass(frozen=True)
class Rounded:
    """An SAE and its weights in bfloat16, by latent, which every step keeps up to date."""

    sae: TrainableSae
    weights: Weights
    skip: Tensor | None
    """A transcoder's, [d_in, d_out]."""

    @classmethod
    def of(cls, sae: TrainableSae) -> "Rounded":
        """Rounded now."""
        like, w_skip = sae.parameters["W_dec"], sae.parameters.get("w_skip")
        weights = Weights(*(torch.empty_like(like, dtype=torch.bfloat16) for _ in range(2)))
        rounded = cls(sae, weights, None if w_skip is None else torch.empty_like(w_skip, dtype=torch.bfloat16))
        rounded.refresh()
        return rounded

    def refresh(self) -> None:
        """Round the weights as they are."""
        self.weights.enc.copy_(self.sae.parameters["W_enc"].T)
        self.weights.dec.copy_(self.sae.parameters["W_dec"])
        self.refresh_skip()

    def refresh_skip(self) -> None:
        """Round the skip as it is, if there is one."""
        if self.skip is not None:
            self.skip.copy_(self.sae.parameters["w_skip"])


@dataclass(frozen=True)
class Seen:
    """What the forward half leaves, on the device."""

    squares: Float[Tensor, ""]
    """This replica's part of mean ||y - y_hat||^2."""
    count: Tensor
    """Pairs, [], int64."""
    fits: Tensor
    """Whether they fit the lists, [], bool."""


class Work:
    """Memory for one step by pairs, and, from the first dense step, for that."""

    def __init__(self, rows: int, d_in: int, prefixes: tuple[int, ...], room: int, programs: int, device: torch.device) -> None:
        """Room for `room` pairs; `programs` share the latents."""
        self._device = device
        width, groups = prefixes[-1], len(prefixes)
        self.room, self.ends, self.shape = room, prefixes, (rows, width, d_in)
        self.prefixes = torch.tensor(prefixes, device=device)
        self.centred = self._empty(rows, d_in, dtype=torch.bfloat16)
        self.pre = self._empty(rows, width, dtype=torch.bfloat16)
        self.errors = self._empty(groups, rows, d_in)
        self.rounded_errors = self._empty(groups, rows, d_in, dtype=torch.bfloat16)
        self.by_row = self._empty(rows, blocks(width, 32), dtype=torch.int32)
        self.by_latent = self._empty(width, blocks(rows, 32), dtype=torch.int32)
        self.row_start = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.row_list = (self._empty(room, dtype=torch.int32), self._empty(room))
        start = torch.zeros(width + 1, dtype=torch.int64, device=device)
        self.lists = Lists(start, self._empty(room, dtype=torch.int32), self._empty(room))
        segments = blocks(room, ROUNDED_SEGMENT)
        sums = (self._empty(segments, d_in), self._empty(segments, d_in), self._empty(segments, 2))
        self.further = Segments(torch.zeros_like(start), *sums)
        self.partial = self._empty(min(width, programs), d_in)
        self._dense: Dense | None = None

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    @property
    def batch(self) -> Batch:
        """What gradients are made of."""
        return Batch(self.centred, self.rounded_errors, self.prefixes)

    @property
    def dense(self) -> "Dense":
        """Made when it is first asked for."""
        if self._dense is None:
            rows, width, d_in = self.shape
            f, d_f = (self._empty(rows, width, dtype=torch.bfloat16) for _ in range(2))
            start = torch.arange(width + 1, device=self._device)
            sums = Segments(start, self._empty(width, d_in), self._empty(width, d_in), self._empty(width, 2))
            self._dense = Dense(f, d_f, sums, Lists(torch.zeros_like(start), self.lists.row, self.lists.pre))
        return self._dense

    def forward(
        self, rounded: Rounded, x: Tensor, target: Tensor, counts: Tensor, by_pairs: bool, collective: Collective
    ) -> Seen:
        """Pre-activations, pairs or all activations, and errors; each latent's pairs, active and near ones into `counts`."""
        if rounded.sae.is_transcoder:
            self.centred.copy_(x)
        else:
            torch.sub(x, rounded.sae.parameters["b_dec"], out=self.centred)
        product(self.centred, rounded.weights.enc.T, self.pre)
        if rounded.skip is not None and collective.mesh.shard == 0:  # other shards' errors are without the target
            target = target - product(self.centred, rounded.skip, torch.empty_like(target))
        reconstruct = self._by_pairs if by_pairs else self._densely
        return reconstruct(rounded, target, counts, collective)

    def skip_gradient(self) -> Float[Tensor, "d_in d_out"]:
        """This replica's part of the gradient by a transcoder's skip, x.T @ errors; of a transcoder `centred` is x."""
        return product(self.centred.T, self.rounded_errors[0], self._empty(self.shape[2], self.shape[2]))

    def _by_pairs(self, rounded: Rounded, target: Tensor, counts: Tensor, collective: Collective) -> Seen:
        sae, mesh = rounded.sae, collective.mesh
        p, bandwidth, lists = sae.parameters, sae.config.preset.bandwidth, self.lists
        mark_pairs(self.pre, p["b_enc"], p["threshold"], bandwidth, self.by_row, self.by_latent)
        count_marks(self.by_row, self.row_start)
        count_marks(self.by_latent, lists.start)
        count = self.row_start[-1].clone()
        if mesh.ranks > 1:
            count = largest(collective, count).long()
        fits = count <= self.room
        self.row_start.mul_(fits)
        lists.start.mul_(fits)
        list_pairs(
            self.pre, p["b_enc"], p["threshold"], bandwidth, (self.by_row, self.row_start, *self.row_list),
            (self.by_latent, lists.start, lists.row, lists.pre), counts, self.further.start[1:], ROUNDED_SEGMENT,
        )  # fmt: skip
        torch.cumsum(self.further.start[1:], 0, out=self.further.start[1:])
        batch = len(target) * mesh.replicas
        squares = decode_errors(
            self.errors, target, p["b_dec"], rounded.weights.dec, self.row_start, *self.row_list,
            p["threshold"], self.prefixes, batch, mesh.shard == 0, self.rounded_errors,
        )  # fmt: skip
        return Seen(self._of_all_shards(squares, batch, collective), count, fits)

    def _densely(self, rounded: Rounded, target: Tensor, counts: Tensor, collective: Collective) -> Seen:
        sae, mesh, f = rounded.sae, collective.mesh, self.dense.f
        p, batch, groups = sae.parameters, len(target) * mesh.replicas, len(self.ends)
        counts.copy_(activate(self.pre, p["b_enc"], p["threshold"], sae.config.preset.bandwidth, f))
        error = p["b_dec"] - target if mesh.shard == 0 else torch.zeros_like(target)
        for group, (start, stop) in enumerate(pairwise((0, *self.ends))):
            error += product(f[:, start:stop], rounded.weights.dec[start:stop], self.errors[group])
            torch.mul(error, 2 / (batch * groups), out=self.errors[group])
        squares = error.square().sum() / batch
        for group in reversed(range(groups - 1)):
            self.errors[group] += self.errors[group + 1]
        self.rounded_errors.copy_(self.errors)
        count = counts[0].sum()
        count = largest(collective, count).long() if mesh.ranks > 1 else count
        return Seen(self._of_all_shards(squares, batch, collective), count, count >= 0)

    def _of_all_shards(self, squares: Tensor, batch: int, collective: Collective) -> Tensor:
        """Errors of all latents in place of this shard's, and their mean square."""
        if collective.mesh.shards == 1:
            return squares
        collective.sum_(self.errors, "shards")
        self.rounded_errors.copy_(self.errors)
        return (self.errors[-1] * (batch * len(self.errors) / 2)).square().sum() / batch

    def gradients(self, rounded: Rounded, by_pairs: bool, collective: Collective) -> tuple[Lists, Segments]:
        """What the update makes gradients of: lists and the sums of further segments, or, of none, one segment a latent."""
        sae, programs = rounded.sae, len(self.partial)
        threshold, bandwidth = sae.parameters["threshold"], sae.config.preset.bandwidth
        is_shared = collective.mesh.replicas > 1
        if not by_pairs:
            self._dense_gradients(rounded)
        elif is_shared:
            sums = (self.dense.sums, self.lists, self.batch, rounded.weights.dec, threshold, bandwidth, ROUNDED_SEGMENT)
            sum_segments(*sums, programs, is_whole=True)
        else:
            sums = (self.further, self.lists, self.batch, rounded.weights.dec, threshold, bandwidth, ROUNDED_SEGMENT)
            sum_segments(*sums, programs)
            return self.lists, self.further
        if is_shared:
            for tensor in self.dense.sums[1:]:
                collective.sum_(tensor, "replicas")
        return self.dense.nobody, self.dense.sums

    def _dense_gradients(self, rounded: Rounded) -> None:
        p, dense, dec = rounded.sae.parameters, self.dense, rounded.weights.dec
        for (start, stop), error in zip(pairwise((0, *self.ends)), self.rounded_errors, strict=True):
            product(error, dec[start:stop].T, dense.d_f[:, start:stop])
            product(dense.f[:, start:stop].T, error, dense.sums.W_dec[start:stop])
        bandwidth = rounded.sae.config.preset.bandwidth
        dense.sums.scalars.copy_(differentiate(dense.d_f, self.pre, p["b_enc"], p["threshold"], bandwidth))
        product(dense.d_f.T, self.centred, dense.sums.W_enc)


@dataclass(frozen=True)
class Dense:
    """Memory for a dense step, in which every latent's gradients are one segment."""

    f: Tensor
    """Activations, bfloat16 [batch, d_sae]."""
    d_f: Tensor
    sums: Segments
    nobody: Lists
    """Lists of no pairs."""
