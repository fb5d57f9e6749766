"""Training on a GPU by pairs: only the encoder's product is dense, and that one in bfloat16; nothing waits for the device.

How many pairs a batch has, only the device knows. Lists of pairs therefore have a fixed room: a step whose pairs do not fit
changes nothing, and is counted. Whether a step goes by pairs or densely depends on the count of the step LAG before, which
has long arrived when it is read, so the choice is the same on every run.

Of several ranks each finds the pairs of its own latents and rows; they meet where `across_ranks` says, and in the counts: if the
pairs of one do not fit, all skip the step, and all go by the count of the one that has most.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.across_ranks import counted, largest, shared_dense_update, shared_penalty
from everyscope.sae.functional import without_skip
from everyscope.sae.gpu_limits import DENSE_SHARE, PAIRS_SHARE, SEGMENT, list_room
from everyscope.sae.kernels.gpu import (
    count_marks,
    decode_errors,
    gradients_at,
    list_marks,
    pre_activations_at,
    round_rows,
    screen,
    to_rows,
)
from everyscope.sae.kernels.gpu_sums import LatentSums, PairLists, sum_gradients, sum_latents
from everyscope.sae.kernels.gpu_triton import blocks
from everyscope.sae.kernels.gpu_update import AdamStep, sum_through_encoder, update_latents, update_latents_by
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import direction_rate, learning_rate_share, skip_rate, sparsity_weight, threshold_rate
from everyscope.sae.trainable import StepLosses, TrainableSae, adam_without_momentum, catch_up, dense_update

LAG = 8
"""Steps after which a count of pairs is looked at [steps]."""

forgiving = torch._dynamo.config.patch(suppress_errors=True)  # pyright: ignore[reportAttributeAccessIssue]
"""Runs what torch.compile cannot compile as it stands, with a warning."""


class GpuPairs:
    """The SAEs of a training group, stepped by pairs where the code is sparse and densely where it is not."""

    def __init__(self, saes: Sequence[TrainableSae], max_pairs: int | None = None, collective: Collective = ALONE) -> None:
        """Take over `saes`, whose tensors change in place; lists have room for `max_pairs`, or for what `list_room` says."""
        self.saes, self.max_pairs, self.collective = saes, max_pairs, collective
        device = saes[0].touched.device
        self._on_cuda = device.type == "cuda"
        self._uses_pairs = torch.zeros(len(saes), dtype=torch.bool)
        self._counts = torch.full((LAG, len(saes)), -1, pin_memory=self._on_cuda)
        self._arrivals: list[torch.cuda.Event | None] = [None] * LAG
        self._skipped = torch.zeros(len(saes), dtype=torch.int64, device=device)
        self._reconstruction = torch.zeros(len(saes), device=device)
        self._dense_update = forgiving(torch.compile(dense_update)) if self._on_cuda else dense_update
        self._screened = [Rounded(sae.parameters["W_enc"].T) for sae in saes]
        self._buffers: dict[tuple[int, ...], GpuBuffers] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beyond the SAEs; waits for counts under way. `skipped` counts steps that did not fit."""
        for arrival in filter(None, self._arrivals):
            arrival.synchronize()
        return {
            "uses_pairs": self._uses_pairs,
            "counts": self._counts,
            "skipped": self._skipped,
            "reconstruction": self._reconstruction,
        }

    def refresh(self) -> None:
        """Recompute what is derived from the parameters; call it after they were changed from outside."""
        for screened in self._screened:
            screened.refresh()

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_in"] | None = None
    ) -> list[StepLosses]:
        """One training step of every SAE on normalised activations, in place; losses stay on the device. An SAE's target is x.

        A step that was skipped for want of room reports the reconstruction of the last one that was not.
        """
        target = x if target is None else target
        with torch.no_grad(), torch.cuda.device_of(x):  # Triton launches on the current device
            return self._step(x.contiguous(), target.contiguous(), step, steps)

    def _step(self, x: Tensor, target: Tensor, step: int, steps: int) -> list[StepLosses]:
        slot = step % LAG
        if arrival := self._arrivals[slot]:
            arrival.synchronize()  # recorded LAG steps ago: holds back only a host that runs so far ahead
        losses, counts = [], []
        for number, sae in enumerate(self.saes):
            self._choose(number, int(self._counts[slot, number]), len(x), step)
            if self._uses_pairs[number]:
                loss, count = self._pairs_step(number, x, target, step, steps)
            elif self.collective.mesh.ranks == 1:
                loss = self._dense_update(sae, x, step, steps, target)
                count = (loss.pairs * len(x)).long()
            else:
                loss, pair_share = shared_dense_update(sae, x, step, steps, self.collective, target)
                count = (pair_share * len(x) * self._widest(sae)).long()
            losses.append(loss)
            counts.append(count)
        self._counts[slot].copy_(torch.stack(counts), non_blocking=True)
        if self._on_cuda:
            arrival = self._arrivals[slot] = self._arrivals[slot] or torch.cuda.Event()
            arrival.record()
        return losses

    def _choose(self, number: int, count: int, rows: int, step: int) -> None:
        """Pairs or dense, by a count of pairs (-1: not known); keeps the present way where that lies between both limits."""
        sae, uses_pairs = self.saes[number], bool(self._uses_pairs[number])
        share = count / (rows * self._widest(sae))
        if uses_pairs and share > DENSE_SHARE:
            catch_up(sae, step)
            self._uses_pairs[number] = False
        elif not uses_pairs and 0 <= share < PAIRS_SHARE:
            self._screened[number].refresh()
            self._uses_pairs[number] = True

    def _pairs_step(self, number: int, x: Tensor, target: Tensor, step: int, steps: int) -> tuple[StepLosses, Tensor]:
        """The step's losses, and the number of pairs that the screen let through, of the rank that has most."""
        sae, screened, mesh = self.saes[number], self._screened[number], self.collective.mesh
        config, p, batch = sae.config, sae.parameters, len(x) * mesh.replicas
        buffers = self._buffers_for(len(x), x.shape[1], sae.prefixes, self._widest(sae))
        count, fits = buffers.find_pairs(x, sae, screened, self.collective)
        left = without_skip(x, target, p.get("w_skip")) if mesh.shard == 0 else target  # others' errors are without it
        squares = buffers.forward(left, sae, self.collective)
        sums = sum_latents(buffers.lists, p["threshold"], config.preset.bandwidth)
        # Not a number in, not a number out, also of a step that was skipped for the many pairs which that makes.
        nonfinite_flag = 0 * (buffers.rounded.norms.sum() + screened.norms.sum())
        num_fired, num_pairs = sums.active.sum(), sums.pairs.sum()
        if mesh.ranks == 1:
            cost = penalty(config, sparsity_weight(config, step), sums.active / batch).contiguous()
        else:
            counts = counted(self.collective, torch.stack([number.double() for number in sums]), squares, nonfinite_flag[None])
            sums = LatentSums(*counts.by_latent[:3].int(), *counts.by_latent[3:].float())
            (num_pairs, num_fired), squares, nonfinite_flag = counts.totals[:2], counts.squares.float(), counts.extra[0].float()
            cost = shared_penalty(sae, step, counts.by_latent[1], num_fired, batch)
        adam = adam_at(sae, step, steps)
        self._update_b_dec(sae, sums, buffers.errors[0].sum(0), fits, adam)
        if config.skip:
            self._update_skip(sae, x.T @ buffers.errors[0], fits, adam._replace(rate=skip_rate(config.preset, step, steps)))
        self._update_latents(sae, screened, buffers, sums, cost, adam)
        self._skipped[number] += ~fits
        self._reconstruction[number] = torch.where(fits, squares, self._reconstruction[number] + nonfinite_flag)
        pairs = torch.where(fits, num_pairs.float(), count.float())
        return StepLosses(self._reconstruction[number].clone(), (num_fired / batch).float(), pairs / batch, sums.active), count

    def _update_latents(
        self, sae: TrainableSae, screened: "Rounded", buffers: "GpuBuffers", sums: LatentSums, cost: Tensor, adam: AdamStep
    ) -> None:
        p, owned = sae.parameters, (sae.parameters, sae.squared, sae.touched, screened.parts, buffers.lists, sums, cost)
        rows, bandwidth = (buffers.centred, buffers.errors, buffers.prefixes), sae.config.preset.bandwidth
        if self.collective.mesh.replicas == 1:
            update_latents(*owned, *rows, sae.coordinate_weights, buffers.segment_sums, bandwidth, adam)
            return
        gradients = p["W_dec"].new_empty(sae.width, 2, p["W_dec"].shape[1])
        sum_gradients(gradients, buffers.lists, p["threshold"], *rows, buffers.segment_sums)
        self.collective.sum_(gradients, "replicas")
        batch = len(buffers.centred) * self.collective.mesh.replicas
        others = (buffers.errors, buffers.prefixes, sae.coordinate_weights)
        update_latents_by(gradients, *owned, *others, batch, bandwidth, adam)

    def _update_b_dec(self, sae: TrainableSae, sums: LatentSums, gradient: Tensor, fits: Tensor, adam: AdamStep) -> None:
        """The decoder's bias, whose gradient every pair of an SAE reaches, through its pre-encoder bias."""
        self.collective.sum_(gradient, "replicas")
        if not sae.is_transcoder:
            from_latents = sum_through_encoder(sums.d_b_enc, sae.parameters["W_enc"].T)
            self.collective.sum_(from_latents, "shards")
            gradient = gradient - from_latents
        self._move_always(sae, "b_dec", gradient, fits, adam)

    def _update_skip(self, sae: TrainableSae, gradient: Tensor, fits: Tensor, adam: AdamStep) -> None:
        """A transcoder's skip; all shards alike, who have the same errors."""
        self.collective.sum_(gradient, "replicas")
        self._move_always(sae, "w_skip", gradient, fits, adam)

    def _move_always(self, sae: TrainableSae, name: str, gradient: Tensor, fits: Tensor, adam: AdamStep) -> None:
        """Move what has a gradient at every step, so that its means of squared gradients are always up to date."""
        p, v = sae.parameters[name], sae.squared[name]
        moved, squared = p.clone(), v.clone()
        adam_without_momentum(moved, gradient, squared, adam.rate, sae.config.preset, adam.step, sae.config.preset.largest_step)
        p.copy_(torch.where(fits, moved, p))
        v.copy_(torch.where(fits, squared, v))

    def _widest(self, sae: TrainableSae) -> int:
        """Latents of the largest shard."""
        return blocks(sae.config.width, self.collective.mesh.shards)

    def _buffers_for(self, rows: int, d_in: int, prefixes: tuple[int, ...], widest: int | None = None) -> "GpuBuffers":
        """Memory for latents whose prefixes these are; as much room as the `widest` shard wants, so that all have the same."""
        key = (rows, d_in, widest or prefixes[-1], *prefixes)
        if key not in self._buffers:
            room = self.max_pairs or list_room(rows, widest or prefixes[-1])
            self._buffers[key] = GpuBuffers(rows, d_in, prefixes, room, self.saes[0].touched.device)
        return self._buffers[key]


class Rounded:
    """Rows in bfloat16 with bounds of their norms and of what rounding took, as the screen needs them."""

    def __init__(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """For `rows`, whose values `refresh` takes."""
        self.rows = rows
        self.norms, self.residuals = rows.new_empty(len(rows)), rows.new_empty(len(rows))
        self.parts = (torch.empty_like(rows, dtype=torch.bfloat16), self.norms, self.residuals)
        self.refresh()

    def refresh(self) -> None:
        """Round the rows as they are now."""
        with torch.cuda.device_of(self.rows):  # Triton launches on the current device
            round_rows(self.rows, *self.parts)


class GpuBuffers:
    """Memory for one step of one SAE, shared by all of the same shapes."""

    def __init__(self, rows: int, d_in: int, prefixes: tuple[int, ...], room: int, device: torch.device) -> None:
        """Room for `room` pairs."""

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        width, self.room = prefixes[-1], room
        self.prefixes = torch.tensor(prefixes, device=device)
        self.centred = torch.zeros(rows, d_in, device=device)
        self.rounded = Rounded(self.centred)
        self.by_row, self.by_latent = empty(rows, blocks(width, 32)), empty(width, blocks(rows, 32))
        self.row_start = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.latent, self.line = empty(room), empty(room)
        self.pre_by_row = empty(room, dtype=torch.float32)
        latent_start = torch.zeros(width + 1, dtype=torch.int64, device=device)
        numbers = [empty(room, dtype=torch.float32) for _ in range(2)]
        self.lists = PairLists(latent_start, empty(room), empty(room), *numbers)
        self.errors = empty(len(prefixes), rows, d_in, dtype=torch.float32)
        self.segment_sums = empty(blocks(room, SEGMENT), 2, d_in, dtype=torch.float32)

    def find_pairs(
        self, x: Tensor, sae: TrainableSae, screened: Rounded, collective: Collective = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Fill in the lists, by row and by latent, with float32 pre-activations; how many the screen let through, if they fit.

        If they do not, at any rank, the lists are empty, so that nothing which goes through them changes anything.
        """
        p, lists = sae.parameters, self.lists
        if sae.is_transcoder:
            self.centred.copy_(x)
            round_rows(self.centred, *self.rounded.parts)
        else:
            round_rows(x, *self.rounded.parts, bias=p["b_dec"], centred=self.centred)
        bandwidth = sae.config.preset.bandwidth
        screen(self.rounded.parts, screened.parts, p["b_enc"], p["threshold"], bandwidth, self.by_row, self.by_latent)
        count_marks(self.by_row, self.row_start)
        count_marks(self.by_latent, lists.start)
        count = self.row_start[-1].clone()
        if collective.mesh.ranks > 1:
            count = largest(collective, count).long()
        fits = count <= self.room
        self.row_start.mul_(fits)
        lists.start.mul_(fits)
        list_marks(self.by_row, self.row_start, self.latent, self.line)
        list_marks(self.by_latent, lists.start, lists.row, lists.latent)
        total = lists.start[-1]
        pre_activations_at(lists.pre, self.centred, lists.row, p["W_enc"].T, lists.latent, p["b_enc"], total)
        to_rows(lists.pre, lists.row, lists.latent, self.row_start, self.latent, self.pre_by_row, total, sae.width)
        return count, fits

    def forward(self, target: Tensor, sae: TrainableSae, collective: Collective) -> Tensor:
        """Fill in the errors and the loss's derivative by each pair's activation; this replica's part of mean ||y - y_hat||^2.

        `target` is what latents and bias are to give.
        """
        p, lists, mesh = sae.parameters, self.lists, collective.mesh
        batch = len(target) * mesh.replicas
        squares = decode_errors(
            self.errors, target, p["b_dec"], p["W_dec"], self.row_start, self.latent, self.pre_by_row, p["threshold"],
            self.prefixes, batch, mesh.shard == 0,
        )  # fmt: skip
        if mesh.shards > 1:
            collective.sum_(self.errors, "shards")
            squares = (self.errors[-1] * (batch * len(self.errors) / 2)).square().sum() / batch
        gradients_at(
            lists.d_f, self.errors, lists.row, p["W_dec"], lists.latent, lists.pre, p["threshold"], sae.config.preset.bandwidth,
            self.prefixes, lists.start[-1],
        )  # fmt: skip
        return squares


def adam_at(sae: TrainableSae, step: int, steps: int) -> AdamStep:
    """Adam's numbers at `step` of `steps`."""
    preset = sae.config.preset
    rate = preset.learning_rate * learning_rate_share(preset, step, steps)
    follow = preset.encoder_scale if preset.encoder_follows else 0.0
    rates = (rate, threshold_rate(sae.config, step, steps), direction_rate(preset, step, steps))
    least_share = 1 / preset.largest_step if preset.largest_step else 0.0
    return AdamStep(step, preset.beta2, preset.epsilon, least_share, *rates, follow)
