"""Training on this machine's CPU by pairs: only the encoder's product is dense, and that one in bfloat16.

The product decides which (row, latent) pairs might matter; float32 decides which do, and with what values. All that comes after
touches these pairs alone. Results therefore depend neither on how the product was summed nor on the number of threads.

Of several ranks each finds the pairs of its own latents and rows. They meet after the reconstruction and before the update.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.across_ranks import counted, shared_dense_update, shared_penalty
from everyscope.sae.kernels.cpu import (
    SUM_ROWS,
    Candidates,
    LatentArrays,
    Pairs,
    Rows,
    centre_rows,
    differentiate,
    reconstruct,
    round_rows,
    screen_rows,
)
from everyscope.sae.kernels.cpu_update import Adam, move_latents, sum_latents, update_always, update_latents
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import direction_rate, learning_rate_share, skip_rate, sparsity_weight, threshold_rate
from everyscope.sae.skip_cpu import blocks_of, factor, move_skip, skip_gradient, subtract_skip
from everyscope.sae.threads import Threads
from everyscope.sae.trainable import StepLosses, TrainableSae, catch_up, dense_update

TILE_NUMBERS = 12 * 2**15
"""Rows of a tile hold at most about so many numbers, to stay in cache beside their errors while all latents pass by."""
TILE_PRODUCTS = 2**26
"""A thread screens at most so many products at a time, which bounds its memory."""
LATENT_CHUNK = 512
"""Latents updated by one thread at a time [latents]."""
DENSE_SHARE, PAIRS_SHARE = 0.2, 0.15
"""Share of all (row, latent) that are pairs above which a step is dense, and below which pairs are tried again."""
LEVELS = 8
"""Groups of rows by norm, in each tile, that share bounds of the screen."""


class CpuPairs:
    """The SAEs of a training group, stepped by pairs where the code is sparse and densely where it is not."""

    def __init__(self, saes: Sequence[TrainableSae], collective: Collective = ALONE, *, rounds_skips: bool = False) -> None:
        """Take over `saes`, whose tensors change in place; as many threads as torch has now.

        With `rounds_skips` a skip's products are of bfloat16 numbers.
        """
        self.saes, self.collective, self._rounds_skips = saes, collective, rounds_skips
        self._threads = Threads(torch.get_num_threads())
        self._uses_pairs = torch.ones(len(saes), dtype=torch.bool)
        self._latents = [latents_of(sae) for sae in saes]
        self._buffers: dict[Shape, CpuBuffers] = {}
        self.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beyond the SAEs."""
        return {"uses_pairs": self._uses_pairs}

    def refresh(self) -> None:
        """Recompute what is derived from the parameters; call it after they were changed from outside."""
        for latents in self._latents:
            round_weights(latents)

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_out"] | None = None
    ) -> list[StepLosses]:
        """One training step of every SAE on normalised activations, this rank's rows, in place; an SAE's target is x."""
        target, losses = x if target is None else target, []
        for number, sae in enumerate(self.saes):
            done = self._pairs_step(number, x, step, steps, target) if self._uses_pairs[number] else None
            losses.append(done or self._dense_step(number, sae, x, step, steps, target))
        return losses

    def _dense_step(self, number: int, sae: TrainableSae, x: Tensor, step: int, steps: int, target: Tensor) -> StepLosses:
        if self._uses_pairs[number]:
            catch_up(sae, step)
        if self.collective.mesh.ranks == 1:
            losses = dense_update(sae, x, step, steps, target)
            self._uses_pairs[number] = bool(losses.pairs < PAIRS_SHARE * sae.config.width)
        else:  # no rank may run out of room where the others do not
            losses, pair_share = shared_dense_update(sae, x, step, steps, self.collective, target)
            self._uses_pairs[number] = bool(pair_share < PAIRS_SHARE)
        if self._uses_pairs[number]:
            round_weights(self._latents[number])
        return losses

    def _pairs_step(self, number: int, x: Tensor, step: int, steps: int, target: Tensor) -> StepLosses | None:
        """The step, or None, with nothing changed, where there are too many pairs."""
        sae, latents, mesh = self.saes[number], self._latents[number], self.collective.mesh
        prefixes, x, target = np.array(sae.prefixes), x.contiguous(), target.contiguous()
        buffers = self._buffers_for(Shape(len(x), x.shape[1], target.shape[1], sae.width, len(prefixes)))
        rows, pairs, batch = buffers.rows._replace(x=x.numpy(), target=target.numpy()), buffers.pairs, len(x) * mesh.replicas
        if sae.config.skip and mesh.shard == 0:  # other shards' errors are without the target
            x, w_skip = (factor(tensor, self._rounds_skips) for tensor in (x, sae.parameters["w_skip"]))
            left = buffers.left_of_skip
            self._threads.map(lambda block: subtract_skip(left, target, x, w_skip, block), blocks_of(len(x)))
            rows = rows._replace(target=left.numpy())
        fits = self._reconstruct(sae, latents, buffers, rows, prefixes, batch)
        squares = torch.tensor(rows.squares.sum(dtype=np.float64))
        if mesh.ranks == 1:
            if not fits:
                return None
            fired, moving = torch.from_numpy(pairs.fired.sum(0)), np.empty(0, np.int64)
            sums = torch.stack([squares, fired.sum(), torch.tensor(pairs.start[:, -1].sum())])
            cost = penalty(sae.config, sparsity_weight(sae.config, step), fired / batch)
        else:
            by_latent = np.stack([pairs.fired.sum(0), np.diff(pairs.start, axis=1).sum(0)])
            counts = counted(self.collective, torch.from_numpy(by_latent), squares, torch.tensor([0.0 if fits else 1.0]))
            if counts.extra[0] > 0:  # at one rank or another
                return None
            fired, moving = counts.by_latent[0], np.flatnonzero(counts.by_latent[1].numpy())
            sums = torch.stack([counts.squares, *counts.totals])
            cost = shared_penalty(sae, step, fired, counts.totals[0], batch)
        group_of = np.searchsorted(prefixes, np.arange(sae.width), side="right")
        update = Update(sae, latents, rows, pairs, group_of, cost.numpy(), batch, adam_at(sae, step, steps))
        if mesh.replicas == 1:
            self._update(update)
        else:
            self._update_with_replicas(update, moving)
        if sae.config.skip:
            self._update_skip(update, buffers, x, skip_rate(sae.config.preset, step, steps))
        reconstruction, l0, num_pairs = (sums / batch).float()
        return StepLosses(reconstruction, l0, num_pairs, fired)

    def _reconstruct(
        self,
        sae: TrainableSae,
        latents: LatentArrays,
        buffers: "CpuBuffers",
        rows: Rows,
        prefixes: np.ndarray,
        batch: int,
    ) -> bool:
        """Find the pairs, and the loss's derivatives by the reconstructions and at the pairs; False where there are too many."""
        b_dec, bandwidth = sae.parameters["b_dec"].numpy(), np.float32(sae.config.preset.bandwidth)
        pre_bias = np.zeros(rows.x.shape[1], np.float32) if sae.is_transcoder else b_dec
        pairs, is_first, tiles = buffers.pairs, self.collective.mesh.shard == 0, range(len(buffers.tiles))

        def forward(tile: int) -> bool:
            start, stop = buffers.tiles[tile]
            centre_rows(rows, pre_bias, start, stop)
            found, screened = buffers.of_this_thread()
            torch.mm(buffers.rounded[start:stop], as_bfloat16(latents.w_rounded).T, out=screened[: stop - start])
            bits = screened[: stop - start].view(torch.int16).numpy()
            if screen_rows(start, bits, rows, latents, bandwidth, found) < 0:
                return False
            reconstruct(tile, start, stop, rows, latents, b_dec, bandwidth, prefixes, found, pairs, is_first)
            return True

        def backward(tile: int) -> None:
            differentiate(tile, *buffers.tiles[tile], rows, latents, prefixes, pairs, batch)

        def both(tile: int) -> bool:
            if not forward(tile):
                return False
            backward(tile)  # at once, while the tile's rows are in cache
            return True

        if self.collective.mesh.shards == 1:
            return all(self._threads.map(both, tiles))
        buffers.overflow[0] = not all(self._threads.map(forward, tiles))
        self.collective.sum_(buffers.errors_and_overflow, "shards")
        if not buffers.overflow[0]:
            self._threads.map(backward, tiles)
        return not buffers.overflow[0]

    def _update(self, update: "Update") -> None:
        """Gradients and update at once, latent by latent."""
        width, d_in = update.latents.W_enc.shape
        starts = range(0, width, LATENT_CHUNK)
        latent_sums = np.zeros((len(starts), d_in), np.float32)
        self._threads.map(
            lambda chunk: update.at_once(starts[chunk], min(starts[chunk] + LATENT_CHUNK, width), latent_sums[chunk]),
            range(len(starts)),
        )
        self._update_b_dec(update, update.rows.d_b_dec.sum(0), latent_sums.sum(0))

    def _update_with_replicas(self, update: "Update", moving: np.ndarray) -> None:
        """Gradients, their sum over replicas, then the update: of those latents alone that have pairs in some replica."""
        (d_in, d_out), starts = (update.rows.x.shape[1], update.rows.target.shape[1]), range(0, len(moving), LATENT_CHUNK)
        flat = np.empty(len(moving) * (d_in + d_out + 2) + d_out, np.float32)  # what replicas add up, in one piece
        gradients, from_errors = flat[:-d_out].reshape(len(moving), d_in + d_out + 2), flat[-d_out:]
        from_errors[:] = update.rows.d_b_dec.sum(0)
        latent_sums = np.zeros((len(starts), d_in), np.float32)

        def part(chunk: int) -> slice:
            return slice(starts[chunk], min(starts[chunk] + LATENT_CHUNK, len(moving)))

        self._threads.map(lambda chunk: update.sum_up(moving[part(chunk)], gradients[part(chunk)]), range(len(starts)))
        self.collective.sum_(torch.from_numpy(flat), "replicas")
        self._threads.map(
            lambda chunk: update.move(moving[part(chunk)], gradients[part(chunk)], latent_sums[chunk]), range(len(starts))
        )
        self._update_b_dec(update, from_errors, latent_sums.sum(0))

    def _update_skip(self, update: "Update", buffers: "CpuBuffers", x: Tensor, rate: float) -> None:
        """Move a transcoder's skip by its gradient; all shards alike, who have the same errors."""
        adam = update.adam._replace(rate=np.float32(rate))
        x, d_y_hat = (factor(tensor, self._rounds_skips) for tensor in (x, buffers.errors[:, 0]))
        skip, squared, blocks = update.sae.parameters["w_skip"], update.sae.squared["w_skip"], blocks_of(x.shape[1])
        if self.collective.mesh.replicas == 1:
            self._threads.map(
                lambda block: move_skip(adam, skip[block], squared[block], skip_gradient(x, d_y_hat, block)), blocks
            )
            return
        gradient = torch.cat(self._threads.map(partial(skip_gradient, x, d_y_hat), blocks))
        self.collective.sum_(gradient, "replicas")
        self._threads.map(lambda block: move_skip(adam, skip[block], squared[block], gradient[block]), blocks)

    def _update_b_dec(self, update: "Update", from_errors: np.ndarray, from_latents: np.ndarray) -> None:
        """Move b_dec by its gradient, of which `from_latents` is this shard's part, through an SAE's pre-encoder bias.

        Not by torch: its sqrt, however short, wakes threads that then spin for milliseconds on cores that the next step wants.
        """
        sae = update.sae
        if not sae.is_transcoder:
            self.collective.sum_(torch.from_numpy(from_latents), "shards")
            from_errors = from_errors + from_latents
        update_always(update.adam, sae.parameters["b_dec"].numpy(), from_errors, sae.squared["b_dec"].numpy())

    def _buffers_for(self, shape: "Shape") -> "CpuBuffers":
        if shape not in self._buffers:
            self._buffers[shape] = CpuBuffers(shape, self._threads.count)
        return self._buffers[shape]


class Shape(NamedTuple):
    """What a step's memory depends on."""

    batch: int
    d_in: int
    d_out: int
    width: int
    groups: int


@dataclass(frozen=True)
class Update:
    """All that one SAE's update needs."""

    sae: TrainableSae
    latents: LatentArrays
    rows: Rows
    pairs: Pairs
    group_of: np.ndarray
    """The group of prefixes that a latent belongs to; [d_sae]"""
    cost: np.ndarray
    """The sparsity terms' derivative by each latent's firing rate; [d_sae]"""
    batch: int
    """Rows of all replicas."""
    adam: Adam

    @property
    def bandwidth(self) -> np.float32:
        """As kernels take it."""
        return np.float32(self.sae.config.preset.bandwidth)

    def at_once(self, start: int, stop: int, d_b_dec: np.ndarray) -> None:
        """Latents [start, stop), from pairs to parameters."""
        update_latents(
            start, stop, self.rows, self.pairs, self.latents, self.group_of, self.cost, self.bandwidth, self.adam, d_b_dec
        )

    def sum_up(self, moving: np.ndarray, gradients: np.ndarray) -> None:
        """The gradients of the latents `moving`."""
        sum_latents(moving, self.rows, self.pairs, self.latents, self.group_of, self.cost, self.bandwidth, self.batch, gradients)

    def move(self, moving: np.ndarray, gradients: np.ndarray, d_b_dec: np.ndarray) -> None:
        """The latents `moving` by their gradients."""
        move_latents(moving, gradients, self.latents, self.adam, d_b_dec)


class CpuBuffers:
    """Memory for one step, shared by SAEs of equal shapes."""

    def __init__(self, shape: Shape, threads: int) -> None:
        """Room for a batch of which DENSE_SHARE are pairs, in a tile for each thread or smaller ones."""
        batch, d_in, d_out, width, groups = shape
        share = min(-(-batch // threads), TILE_NUMBERS // d_in, TILE_PRODUCTS // width)
        tile_rows = max(1, -(-share // SUM_ROWS)) * SUM_ROWS
        self.tiles = [(start, min(start + tile_rows, batch)) for start in range(0, batch, tile_rows)]
        self._tile_rows = tile_rows
        self._room, self._width = max(1, int(DENSE_SHARE * width * min(tile_rows, batch))), width
        self._local = threading.local()
        self.rounded = torch.empty(batch, d_in, dtype=torch.bfloat16)
        self.errors_and_overflow = torch.empty(batch * groups * d_out + 1)  # what shards add up, in one piece
        self.overflow = self.errors_and_overflow[-1:]
        self.errors = self.errors_and_overflow[:-1].view(batch, groups, d_out)
        self.left_of_skip = torch.empty(batch, d_out)
        self.rows = Rows(
            x=np.empty((0, d_in), np.float32),
            target=np.empty((0, d_out), np.float32),
            centred=np.empty((batch, d_in), np.float32),
            rounded=self.rounded.view(torch.int16).numpy().view(np.uint16),
            norms=np.empty(batch, np.float32),
            residuals=np.empty(batch, np.float32),
            errors=self.errors.numpy(),
            squares=np.empty(batch, np.float32),
            d_b_dec=np.empty((-(-batch // SUM_ROWS), d_out), np.float32),
        )
        places = (len(self.tiles), self._room)
        self.pairs = Pairs(
            start=np.empty((len(self.tiles), width + 1), np.int32),
            row=np.empty(places, np.int32),
            pre=np.empty(places, np.float32),
            d_f=np.empty(places, np.float32),
            fired=np.empty((len(self.tiles), width), np.int32),
        )

    def of_this_thread(self) -> tuple[Candidates, Tensor]:
        """Memory for one tile's candidates and for its products, bfloat16 [tile, d_sae]."""
        if not hasattr(self._local, "memory"):
            hits = np.zeros(-(-self._width // 8) * 8, np.int8)
            candidates = Candidates(
                row=np.empty(self._room, np.int32),
                latent=np.empty(self._room, np.int32),
                start=np.empty(self._width + 1, np.int32),
                row_by_latent=np.empty(self._room, np.int32),
                bounds=np.empty((LEVELS, self._width), np.int16),
                level=np.empty(self._tile_rows, np.int32),
                hits=hits,
                eight_hits=hits.view(np.int64),
            )
            self._local.memory = candidates, torch.empty(self._tile_rows, self._width, dtype=torch.bfloat16)
        return self._local.memory


def as_bfloat16(bits: np.ndarray) -> Tensor:
    """The tensor whose bits these are, in the same memory."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def latents_of(sae: TrainableSae) -> LatentArrays:
    """The SAE's tensors as arrays by latent, sharing its memory, with room for the screen's own."""
    p, v, width = sae.parameters, sae.squared, sae.width
    return LatentArrays(
        W_enc=p["W_enc"].T.numpy(),
        W_dec=p["W_dec"].numpy(),
        b_enc=p["b_enc"].numpy(),
        threshold=p["threshold"].numpy(),
        squared_W_enc=v["W_enc"].T.numpy(),
        squared_W_dec=v["W_dec"].view(width, -1).numpy(),
        squared_b_enc=v["b_enc"].numpy(),
        squared_threshold=v["threshold"].numpy(),
        coordinate_weights=None if sae.is_transcoder else sae.coordinate_weights.numpy(),
        touched=sae.touched.numpy(),
        w_rounded=np.empty((width, len(p["W_enc"])), np.uint16),
        w_norms=np.empty(width, np.float32),
        w_residuals=np.empty(width, np.float32),
    )


def round_weights(latents: LatentArrays) -> None:
    """Recompute the screen's copy of W_enc, where others than the fused update have changed it."""
    round_rows(latents.W_enc, 0, len(latents.W_enc), latents.w_rounded, latents.w_norms, latents.w_residuals)


def adam_at(sae: TrainableSae, step: int, steps: int) -> Adam:
    """Adam's numbers at `step` (from 0) of `steps`."""
    preset = sae.config.preset
    return Adam(
        steps=step + 1,
        beta2=preset.beta2,
        fresh=np.float32(1 - preset.beta2),
        correction=np.float32(1 / (1 - preset.beta2 ** (step + 1))),
        epsilon=np.float32(preset.epsilon),
        least_share=np.float32(1 / preset.largest_step if preset.largest_step else 0),
        rate=np.float32(preset.learning_rate * learning_rate_share(preset, step, steps)),
        threshold_rate=np.float32(threshold_rate(sae.config, step, steps)),
        direction_rate=np.float32(direction_rate(preset, step, steps)),
        follow=np.float32(preset.encoder_scale if preset.encoder_follows else 0),
    )
