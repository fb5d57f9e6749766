"""Training on this machine's CPU by pairs: only the encoder's product is dense, and that one in bfloat16.

The product decides which (row, latent) pairs might matter; float32 decides which do, and with what values. All that comes after
touches these pairs alone. Results therefore depend neither on how the product was summed nor on the number of threads.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.kernels.cpu import (
    SUM_ROWS,
    Candidates,
    Latents,
    Pairs,
    Rows,
    centre_rows,
    differentiate,
    reconstruct,
    round_rows,
    screen_rows,
)
from everyscope.sae.kernels.cpu_update import Adam, update_b_dec, update_latents
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import learning_rate_share, sparsity_coefficient, threshold_rate
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


Result = TypeVar("Result")


class Threads:
    """Work spread over threads that leave one another's cores alone: torch's own products stay within their thread."""

    def __init__(self, count: int) -> None:
        """A pool of `count` threads; one is no pool at all."""
        self.count = count
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None

    def map(self, work: Callable[[int], Result], items: Iterable[int]) -> list[Result]:
        """Results of `work`, in the order of `items`."""
        return list(self._pool.map(work, items) if self._pool else map(work, items))


class CpuPairs:
    """The SAEs of a bank, stepped by pairs where the code is sparse and densely where it is not."""

    def __init__(self, saes: Sequence[TrainableSae]) -> None:
        """Take over `saes`, whose tensors change in place; as many threads as torch has now."""
        self.saes = saes
        self._threads = Threads(torch.get_num_threads())
        self._uses_pairs = torch.ones(len(saes), dtype=torch.bool)
        self._latents = [latents_of(sae) for sae in saes]
        self._buffers: dict[tuple[int, int, int, int], Buffers] = {}
        self.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beyond the SAEs."""
        return {"uses_pairs": self._uses_pairs}

    def refresh(self) -> None:
        """Make anew what is derived from the parameters; call it where they were changed from outside."""
        for latents in self._latents:
            round_weights(latents)

    def step(self, x: Float[Tensor, "batch d_in"], step: int, steps: int) -> list[StepLosses]:
        """One training step of every SAE on normalised activations, in place."""
        losses = []
        for number, sae in enumerate(self.saes):
            done = self._pairs_step(number, x, step, steps) if self._uses_pairs[number] else None
            losses.append(done or self._dense_step(number, sae, x, step, steps))
        return losses

    def _dense_step(self, number: int, sae: TrainableSae, x: Tensor, step: int, steps: int) -> StepLosses:
        if self._uses_pairs[number]:
            catch_up(sae, step)
        losses = dense_update(sae, x, step, steps)
        self._uses_pairs[number] = bool(losses.pairs < PAIRS_SHARE * sae.config.width)
        if self._uses_pairs[number]:
            round_weights(self._latents[number])
        return losses

    def _pairs_step(self, number: int, x: Tensor, step: int, steps: int) -> StepLosses | None:
        """The step, or None, with nothing changed, where there are too many pairs."""
        sae, latents = self.saes[number], self._latents[number]
        recipe, width = sae.config.recipe, sae.config.width
        prefixes = np.array(sae.config.prefixes)
        buffers = self._buffers_for(len(x), x.shape[1], width, len(prefixes))
        rows, pairs = buffers.rows._replace(x=x.contiguous().numpy()), buffers.pairs
        b_dec, bandwidth = sae.parameters["b_dec"].numpy(), np.float32(recipe.bandwidth)

        def forward(tile: int) -> bool:
            start, stop = buffers.tiles[tile]
            centre_rows(rows, b_dec, start, stop)
            found, screened = buffers.of_this_thread()
            torch.mm(buffers.rounded[start:stop], as_bfloat16(latents.w_rounded).T, out=screened[: stop - start])
            bits = screened[: stop - start].view(torch.int16).numpy()
            if screen_rows(start, bits, rows, latents, bandwidth, found) < 0:
                return False
            reconstruct(tile, start, stop, rows, latents, b_dec, bandwidth, prefixes, found, pairs)
            differentiate(tile, start, stop, rows, latents, prefixes, pairs)
            return True

        if not all(self._threads.map(forward, range(len(buffers.tiles)))):
            return None
        fired = torch.from_numpy(pairs.fired.sum(0))
        cost = penalty(sae.config, sparsity_coefficient(sae.config, step), fired / len(x)).numpy()
        adam = adam_at(sae, step, steps)
        group_of = np.searchsorted(prefixes, np.arange(width), side="right")
        starts = range(0, width, LATENT_CHUNK)
        latent_sums = np.zeros((len(starts), x.shape[1]), np.float32)

        def update(chunk: int) -> None:
            start, stop = starts[chunk], min(starts[chunk] + LATENT_CHUNK, width)
            update_latents(start, stop, rows, pairs, latents, group_of, cost, bandwidth, adam, latent_sums[chunk])

        self._threads.map(update, range(len(starts)))
        # Not by torch: its sqrt, however short, wakes threads that then spin for milliseconds on cores that the next step wants.
        update_b_dec(adam, b_dec, rows.d_b_dec.sum(0) + latent_sums.sum(0), sae.squared["b_dec"].numpy())
        squares = rows.squares.sum(dtype=np.float64)
        means = torch.tensor([squares, pairs.fired.sum(), pairs.start[:, -1].sum()], dtype=torch.float64) / len(x)
        reconstruction, l0, num_pairs = means.float()
        return StepLosses(reconstruction, l0, num_pairs, fired)

    def _buffers_for(self, batch: int, d_in: int, width: int, groups: int) -> "Buffers":
        key = (batch, d_in, width, groups)
        if key not in self._buffers:
            self._buffers[key] = Buffers(batch, d_in, width, groups, self._threads.count)
        return self._buffers[key]


class Buffers:
    """Memory for one step, shared by SAEs of equal shapes."""

    def __init__(self, batch: int, d_in: int, width: int, groups: int, threads: int) -> None:
        """Room for a batch of which DENSE_SHARE are pairs, in a tile for each thread or smaller ones."""
        share = min(-(-batch // threads), TILE_NUMBERS // d_in, TILE_PRODUCTS // width)
        tile_rows = max(1, -(-share // SUM_ROWS)) * SUM_ROWS
        self.tiles = [(start, min(start + tile_rows, batch)) for start in range(0, batch, tile_rows)]
        self._tile_rows = tile_rows
        self._room, self._width = max(1, int(DENSE_SHARE * width * min(tile_rows, batch))), width
        self._local = threading.local()
        self.rounded = torch.empty(batch, d_in, dtype=torch.bfloat16)
        self.rows = Rows(
            x=np.empty((0, d_in), np.float32),
            centred=np.empty((batch, d_in), np.float32),
            rounded=self.rounded.view(torch.int16).numpy().view(np.uint16),
            norms=np.empty(batch, np.float32),
            residuals=np.empty(batch, np.float32),
            errors=np.empty((batch, groups, d_in), np.float32),
            squares=np.empty(batch, np.float32),
            d_b_dec=np.empty((-(-batch // SUM_ROWS), d_in), np.float32),
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


def latents_of(sae: TrainableSae) -> Latents:
    """The SAE's tensors as arrays by latent, sharing its memory, with room for the screen's own."""
    p, v, width = sae.parameters, sae.squared, sae.config.width
    return Latents(
        w_enc=p["w_enc"].T.numpy(),
        w_dec=p["w_dec"].numpy(),
        b_enc=p["b_enc"].numpy(),
        threshold=p["threshold"].numpy(),
        squared_w_enc=v["w_enc"].T.numpy(),
        squared_w_dec=v["w_dec"].numpy(),
        squared_b_enc=v["b_enc"].numpy(),
        squared_threshold=v["threshold"].numpy(),
        touched=sae.touched.numpy(),
        w_rounded=np.empty((width, len(p["b_dec"])), np.uint16),
        w_norms=np.empty(width, np.float32),
        w_residuals=np.empty(width, np.float32),
    )


def round_weights(latents: Latents) -> None:
    """Make the screen's copy of w_enc anew, where others than the fused update have changed it."""
    round_rows(latents.w_enc, 0, len(latents.w_enc), latents.w_rounded, latents.w_norms, latents.w_residuals)


def adam_at(sae: TrainableSae, step: int, steps: int) -> Adam:
    """Adam's numbers at `step` (from 0) of `steps`."""
    recipe = sae.config.recipe
    return Adam(
        steps=step + 1,
        beta2=recipe.beta2,
        fresh=np.float32(1 - recipe.beta2),
        correction=np.float32(1 / (1 - recipe.beta2 ** (step + 1))),
        epsilon=np.float32(recipe.epsilon),
        rate=np.float32(recipe.learning_rate * learning_rate_share(recipe, step, steps)),
        threshold_rate=np.float32(threshold_rate(sae.config, step, steps)),
    )
